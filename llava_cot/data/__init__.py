"""Training data: how it is read, checked, annotated, made from searches, and batched."""
