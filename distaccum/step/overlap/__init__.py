"""The last T micro-batches block by block, so that gradients travel behind them. The rest does not need it."""
