"""The op ``pc_linear`` and the choice of its backend."""

from ipca.ops.backend import BACKENDS, set_backend
from ipca.ops.linear import pc_linear

__all__ = ["BACKENDS", "pc_linear", "set_backend"]
