"""Registered PyTorch ops and the functions that call them."""

from ipca.ops.linear import pc_linear

__all__ = ["pc_linear"]
