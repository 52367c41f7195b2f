"""Study of the window's position on a pretrained vision transformer: protocol, resumable runs, and their report."""
