"""Runs many search programs on one model as one continuous batch: paged text KV, one copy of each image."""
