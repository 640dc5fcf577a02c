"""Saves and loads checkpoints, which all ranks write together and which are read without pickle."""
