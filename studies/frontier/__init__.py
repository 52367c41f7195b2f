"""Studies of how far a language model moves for what it learns: runs collected in the background, and their report."""
