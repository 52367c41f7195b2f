"""Files of a sharded model: every process gathers its tensors one by one, the first alone keeps and writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch.distributed as dist
from torch import Tensor, nn

from ipca._dtensor import full, is_sharded


def needs_all(model: nn.Module) -> bool:
    """Whether ``model`` is spread over processes, as by ``fully_shard``, so that all must help to write it."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def is_writer(model: nn.Module) -> bool:
    """Whether this process writes the files of ``model``: every one of a whole model, rank 0 of a sharded one."""
    return not needs_all(model) or dist.get_rank() == 0


def plain_type(model: nn.Module) -> type[nn.Module]:
    """The class of ``model`` as its author wrote it; ``fully_shard`` puts two of PyTorch's in front."""
    return next(cls for cls in type(model).__mro__ if not cls.__module__.startswith("torch.distributed."))


def gathered(tensors: Iterable[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    """Each tensor whole and on the CPU; one at a time, so that no process holds them all on its device.

    Args:
        tensors: names and tensors, the same ones in the same order in every process.
        keep: False where this process only helps the others; the result is then empty.
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
        RuntimeError: rank 0 could not write; it raises its own error.
    """
    if not needs_all(model):
        write()
        return
    error: Exception | None = None
    if is_writer(model):
        try:
            write()
        except Exception as problem:  # whatever it is, the other processes must hear of it
            error = problem
    verdict = [None if error is None else f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(verdict, src=0)
    if error is not None:
        raise error
    if verdict[0] is not None:
        raise RuntimeError(f"rank 0 could not write: {verdict[0]}")
