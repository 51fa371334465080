"""From data to a trained model: the trainer and its parts."""
