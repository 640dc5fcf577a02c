"""Windows over loaders, and data sets."""
