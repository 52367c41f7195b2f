"""``ipca demo``: a real model, real text, and the method beside its neighbours."""

from ipca.demo.run import demo

__all__ = ["demo"]
