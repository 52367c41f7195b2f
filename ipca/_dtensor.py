"""Tensors and models sharded by ``fully_shard`` or tensor parallelism: detection, gathering, files written once.

A DTensor is recognized by its method, so that nothing here imports ``torch.distributed.tensor``.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

import torch.distributed as dist
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter, type(None))


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether ``tensor`` is a DTensor, of which this process may hold only a part."""
    # By type first: a plain tensor lacks the method, and finding that out takes longer than all other checks of a call.
    return type(tensor) not in _PLAIN and hasattr(tensor, "full_tensor")


def full(tensor: Tensor) -> Tensor:
    """The full ``tensor`` on this process; for a DTensor a collective that every process of its mesh must call."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor``, full and the same in every process, sharded as ``like`` is; unchanged if ``like`` is not sharded."""
    if is_sharded(tensor) or not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def is_sharded_model(model: nn.Module) -> bool:
    """Whether ``model`` is spread over processes, so that all of them must help to write it."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def is_replicated(model: nn.Module) -> bool:
    """Whether a DistributedDataParallel of several processes is in ``model``, is ``model``, or holds it.

    It has listed the parameters that it averages over the processes: those that come later would not be.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    replicated = nn.parallel.DistributedDataParallel
    if any(isinstance(module, replicated) for module in model.modules()):
        return True
    gc.collect()  # one that is gone holds nothing
    wrappers = [each for each in gc.get_objects() if issubclass(type(each), replicated)]
    return any(module is model for wrapper in wrappers for module in wrapper.modules())


def is_writer(model: nn.Module) -> bool:
    """Whether this process writes the files of ``model``: rank 0 if it is sharded, every process otherwise."""
    return not is_sharded_model(model) or dist.get_rank() == 0


def plain_type(model: nn.Module) -> type[nn.Module]:
    """The class of ``model`` as its author wrote it; ``fully_shard`` puts two of PyTorch's in front."""
    return next(cls for cls in type(model).__mro__ if not cls.__module__.startswith("torch.distributed."))


def gathered(tensors: Iterable[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    """Each tensor full and on the CPU; one at a time, so that no process holds them all on its device.

    Args:
        tensors: names and tensors, the same ones in the same order in every process.
        keep: False where this process only takes part in the collectives; the result is then empty.
    """
    held = {}
    for name, tensor in tensors:
        whole = full(tensor.detach())
        if keep:
            held[name] = whole.cpu().contiguous()
    return held


def write_once(model: nn.Module, write: Callable[[], None]) -> None:
    """Call ``write`` in the process that :func:`is_writer`; the others wait for it, and fail where it fails.

    Raises:
        RuntimeError: rank 0 could not write; rank 0 itself raises the original error.
    """
    if not is_sharded_model(model):
        write()
        return
    error: Exception | None = None
    if is_writer(model):
        try:
            write()
        except Exception as problem:  # the other processes wait and must learn of any error
            error = problem
    verdict = [None if error is None else f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(verdict, src=0)
    if error is not None:
        raise error
    if verdict[0] is not None:
        raise RuntimeError(f"rank 0 could not write: {verdict[0]}")
