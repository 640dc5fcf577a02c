"""What changes inside a model: BatchNorm's statistics, blocks, precision."""
