"""The study of the window's position: protocol, runs, rows, and what its tables say."""
