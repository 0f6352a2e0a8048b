"""The parts of bench_vs_torch.py: the two sides, the watch over the machine, and what PyTorch does for each case."""
