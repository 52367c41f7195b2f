"""Tensors that ``fully_shard`` or tensor parallelism has spread over processes: seeing them, putting them together.

A DTensor is known by its method, so that nothing here imports ``torch.distributed.tensor``.
"""

from __future__ import annotations

from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter, type(None))


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether ``tensor`` is a DTensor, of which this process may hold a part."""
    # By type first: a plain tensor lacks the method, and finding that out takes longer than all other checks of a call.
    return type(tensor) not in _PLAIN and hasattr(tensor, "full_tensor")


def full(tensor: Tensor) -> Tensor:
    """The whole of ``tensor`` on this process; of a DTensor a collective that every process of its mesh must call."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor``, whole and the same in every process, spread as ``like`` is; itself where either says not to."""
    if is_sharded(tensor) or not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)
