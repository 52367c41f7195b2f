"""Adapters of models larger than memory, made layer by layer by ``ipca init``."""
