"""What the studies say together, model by model."""
