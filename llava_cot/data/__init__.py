"""What is trained on: read, checked, annotated, made of searches; and how it becomes batches."""
