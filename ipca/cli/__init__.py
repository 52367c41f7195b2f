"""The command line ``ipca``."""
