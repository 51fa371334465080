"""Training: the trainer and its parts."""
