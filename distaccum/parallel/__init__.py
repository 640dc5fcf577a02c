"""Turns a window's gradients into global sums: strategies, ranks and the traffic ledger."""
