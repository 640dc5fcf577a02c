"""Handles gradients after autograd: dtype of sums, norm, clipping and loss scale."""
