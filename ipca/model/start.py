"""One layer's start as a configuration asks for it: how exactly its window is found, its factors' dtype and form."""

from __future__ import annotations

from dataclasses import replace
from typing import TypedDict

import torch
from torch import Tensor

from ipca.config import PCConfig
from ipca.model.targets import Target
from ipca.nn import InitialFactors, default_adapter_dtype, factors_from_svd
from ipca.svd import WindowSVD


class Precision(TypedDict):
    """Arguments of :func:`ipca.window_svd`."""

    tol: float | str
    dtype: torch.dtype


def precision(config: PCConfig, weight: Tensor) -> Precision:
    """How exactly to decompose ``weight``; in float64 where its device has that."""
    return Precision(tol=config.tol, dtype=weight.dtype if weight.device.type == "mps" else torch.float64)


def start_of(
    target: Target,
    config: PCConfig,
    weight: Tensor,
    found: WindowSVD,
    digest: str | None = None,
    source: str = "weight",
) -> InitialFactors:
    """Split ``found``, the window of ``weight (out, in)``, between the factors; raises as :func:`factors_from_svd`.

    ``digest`` is that of the base, where it is known already; ``source`` says what ``weight`` is, for the report.
    """
    named = getattr(torch, config.adapter_dtype) if config.adapter_dtype else default_adapter_dtype(weight.dtype)
    start = factors_from_svd(
        weight,
        found,
        scaling=target.alpha / target.window.rank,
        form=target.form,
        adapter_dtype=named,
        digest=digest,
    )
    assert start.svd is not None
    return replace(start, svd=replace(start.svd, source=source))
