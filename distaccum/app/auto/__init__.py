"""Before a training begins: what each way of running it needs, which one to take, and the micro-batch that fits."""
