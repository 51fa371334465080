"""Whatever runs a model for a search, one to a module or package."""
