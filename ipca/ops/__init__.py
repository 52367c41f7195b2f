"""Registered PyTorch ops, the functions that call them, and which backend computes them."""

from ipca.ops.backend import BACKENDS, set_backend
from ipca.ops.linear import pc_linear
from ipca.ops.low_rank_linear import Layer
from ipca.ops.shared import pc_linear_shared

__all__ = ["BACKENDS", "Layer", "pc_linear", "pc_linear_shared", "set_backend"]
