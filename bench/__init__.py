"""Benchmarks of speed and memory, and the tables and figures generated from their rows."""
