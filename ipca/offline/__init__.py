"""Adapters of models that are larger than memory, made layer by layer: what ``ipca init`` runs."""
