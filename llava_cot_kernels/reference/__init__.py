"""The meaning of every op in plain PyTorch: the definition of right."""
