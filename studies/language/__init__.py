"""Study of the window's position on a language model: protocol, runs collected in the background, and their report."""
