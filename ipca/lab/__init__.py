"""Experiments: sweeps, baselines, continual learning, the demo, and shared statistics."""
