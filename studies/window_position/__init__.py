"""Study of the window's position: protocol, experiments, rows, and the page generated from them."""
