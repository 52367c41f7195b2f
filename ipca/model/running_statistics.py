"""Running statistics of BatchNorm and InstanceNorm, which training moves and an adapter file does not hold."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

_START = "_ipca_statistics_at_start"


def watch_statistics(model: nn.Module) -> None:
    """Remember the statistics of ``model``; what was remembered before stays."""
    for module in model.modules():
        if isinstance(module, _NormBase) and not hasattr(module, _START):
            setattr(module, _START, [value.detach().cpu().clone() for value in _statistics(module)])


def forget_statistics(model: nn.Module) -> None:
    """Undo :func:`watch_statistics`, where the statistics have become those of a plain model."""
    for module in model.modules():
        vars(module).pop(_START, None)


def warn_moved_statistics(model: nn.Module, saved: Iterable[str] = (), *, stacklevel: int = 3) -> None:
    """Warn of statistics that have moved since :func:`watch_statistics`.

    Args:
        saved: paths of modules that are saved with all that is in them.
    """
    within = tuple(f"{name}." for name in saved)
    moved = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and _moved(module) and not f"{name}.".startswith(within)
    }
    if moved:
        name, kind = next(iter(moved.items()))
        more = f" and {len(moved) - 1} more" if len(moved) > 1 else ""
        warnings.warn(
            f"{name}{more}: the running statistics of {kind} moved in training. An adapter file does not hold them, so "
            "what loads will not be what was trained. Name these layers in modules_to_save when you adapt the model, "
            "or keep them in eval() while it trains.",
            RuntimeWarning,
            stacklevel=stacklevel,
        )


def _moved(module: _NormBase) -> bool:
    """Whether the statistics differ from those at the start, up to a cast, or are of an unknown start."""
    now = [value.detach().cpu() for value in _statistics(module)]
    start: list[Tensor] = getattr(module, _START, [])
    return len(start) != len(now) or not all(torch.equal(a.to(b.dtype), b) for a, b in zip(start, now, strict=True))


def _statistics(module: _NormBase) -> list[Tensor]:
    """The running mean and variance of ``module``; none where it has none, or no values for them."""
    held = [value for value in (module.running_mean, module.running_var) if value is not None]
    return [value for value in held if not (is_lazy(value) or value.is_meta)]
