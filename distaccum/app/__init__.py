"""Implements the `distaccum` program: configuration, task, training, validation and commands."""
