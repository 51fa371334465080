"""From data to a trained model: the trainer and its parts, and what makes the bundled small world."""
