"""What changes inside a model's forward: precision."""
