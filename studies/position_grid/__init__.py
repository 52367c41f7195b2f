"""Study of the window's position on a fine grid, on a causal language model of microbial communities."""
