"""Checkpoints: written by all ranks, in place at once or not at all, and read without running anybody's code."""
