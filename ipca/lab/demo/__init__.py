"""``ipca demo``: a real model, real text, and the method beside its neighbors."""

from ipca.lab.demo.run import demo

__all__ = ["demo"]
