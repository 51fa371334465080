"""What a search did, to look at: a trace as one HTML page or as a tree in the terminal, many as an index of pages."""
