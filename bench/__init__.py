"""Measurements of speed and memory, and the tables and pictures that are made of them."""
