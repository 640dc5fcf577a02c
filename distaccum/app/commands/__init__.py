"""Implements the commands of the command line, one per module."""
