"""Gradients after autograd: accumulation in float32, norm and clipping."""
