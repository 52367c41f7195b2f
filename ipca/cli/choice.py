"""What the options of ``inspect`` and ``init`` choose, as a PCConfig."""

from __future__ import annotations

import argparse
from contextlib import suppress

from ipca.config import PCConfig


def chosen_config(args: argparse.Namespace) -> PCConfig:
    """The options as a config; raises as :class:`ipca.PCConfig` does."""
    tol: float | str = getattr(args, "tol", "default")
    with suppress(ValueError):  # a name is left to PCConfig
        tol = float(tol)
    return PCConfig(
        rank=args.rank,
        window=args.window,
        alpha=args.alpha,
        form=getattr(args, "form", "intact"),
        targets=tuple(args.targets) if args.targets else "all-linear",
        exclude=tuple(args.exclude),
        tol=tol,
    )
