"""Computes the last T micro-batches block by block, so that this hides communication.

The rest of `distaccum.step` can be understood without it.
"""
