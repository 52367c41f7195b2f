"""Running statistics of BatchNorm, which training moves and an adapter file does not hold."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_START = "_ipca_batches_at_start"


def watch_statistics(model: nn.Module) -> None:
    """Remember how many batches the statistics of ``model`` have seen; what was remembered before stays."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not hasattr(module, _START):
            setattr(module, _START, _batches(module))


def warn_moved_statistics(model: nn.Module, saved: Iterable[str] = (), *, stacklevel: int = 3) -> None:
    """Warn of statistics that have moved since :func:`watch_statistics`.

    Args:
        saved: paths of modules that are saved with all that is in them.
    """
    within = tuple(f"{name}." for name in saved)
    moved = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and getattr(module, _START, None) != _batches(module)
        and not f"{name}.".startswith(within)
    ]
    if moved:
        more = f" and {len(moved) - 1} more" if len(moved) > 1 else ""
        warnings.warn(
            f"{moved[0]}{more}: the running statistics of BatchNorm moved in training. An adapter file does not hold "
            "them, so what loads will not be what was trained. Name these layers in modules_to_save when you adapt the "
            "model, or keep them in eval() while it trains.",
            RuntimeWarning,
            stacklevel=stacklevel,
        )


def _batches(module: _BatchNorm) -> int | None:
    """How many batches the statistics of ``module`` have seen; None where it has none."""
    count = module.num_batches_tracked
    return None if count is None or count.is_meta else int(count)
