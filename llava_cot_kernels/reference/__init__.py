"""The reference of every op in plain PyTorch, which defines the correct result."""
