"""The command line: ``ipca inspect | init | merge | export | convert | cache | completion | demo``."""

from ipca.cli.main import main

__all__ = ["main"]
