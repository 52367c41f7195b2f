"""Experiments: sweeps, baselines, continual learning, the demo, and the statistics they share."""
