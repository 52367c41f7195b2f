"""The zoo: tiny random architectures, and everything that is done with an adapter tried on each of them."""
