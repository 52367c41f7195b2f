"""Registered ops: ``pc_linear``, and the backend that computes it."""

from ipca.ops.backend import BACKENDS, set_backend
from ipca.ops.linear import pc_linear

__all__ = ["BACKENDS", "pc_linear", "set_backend"]
