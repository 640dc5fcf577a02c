"""Changes modules inside a model: BatchNorm statistics, checkpointed and compiled blocks."""
