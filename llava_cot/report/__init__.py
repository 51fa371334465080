"""Show what a search did: one trace as an HTML page or as a tree in the terminal, many as an index of pages."""
