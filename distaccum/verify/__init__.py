"""A configuration proven by one window. Reading order: prove, capture, reference, compare, result."""
