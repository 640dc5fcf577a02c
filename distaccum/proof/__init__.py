"""The proof of a configuration, by one window. Reading order: prove, observed, reference, judge, result."""
