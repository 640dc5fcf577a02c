"""Holds the version of the package, which is also written into result files."""

__version__ = "0.2.0"
