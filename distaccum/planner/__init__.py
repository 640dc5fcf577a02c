"""Predicts the memory of a rank and the traffic of a step from shapes, before anything is trained.

Micro-batches and optimizer updates that must run for a prediction run on fake tensors.
"""
