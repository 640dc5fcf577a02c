"""Chooses how to run a training before it begins: strategy, sync policy and micro-batch size.

The choice follows from the predicted memory and time of each plan, and from dry runs.
"""
