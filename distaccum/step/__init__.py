"""Runs one optimizer step per window of micro-batches.

Reading order: accumulator, consensus, micro_batches, plain_order, record.
"""
