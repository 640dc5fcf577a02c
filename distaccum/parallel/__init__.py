"""How the gradients of a window become global sums: strategies, the ranks, and the ledger of what travelled."""
