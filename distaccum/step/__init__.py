"""One optimizer step of one window. Reading order: accumulator, consensus, micro_batches, plain_order, record."""
