"""The command line: ``ipca inspect | init | merge | export | demo``."""

from ipca.cli.main import main

__all__ = ["main"]
