"""What the options of ``inspect`` and ``init`` choose, as a AdapterSettings."""

from __future__ import annotations

import argparse
from contextlib import suppress

from ipca.model.settings import AdapterSettings


def chosen_config(args: argparse.Namespace) -> AdapterSettings:
    """The options as a config; raises as :class:`ipca.PCConfig` does."""
    tol: float | str = getattr(args, "tol", "default")
    with suppress(ValueError):  # a name is left to AdapterSettings
        tol = float(tol)
    return AdapterSettings(
        rank=args.rank,
        window=args.window,
        alpha=args.alpha,
        form=getattr(args, "form", "intact"),
        targets=tuple(args.targets) if args.targets else "all-linear",
        exclude=tuple(args.exclude),
        tol=tol,
    )


def check_no_window_options(args: argparse.Namespace, why: str) -> None:
    """Raise where an option of windows was given that has no meaning here, for the reason ``why``."""
    defaults = {"rank": 16, "window": "middle", "alpha": None, "targets": None, "exclude": [], "plot": None}
    given = [f"--{name}" for name, default in defaults.items() if getattr(args, name) != default]
    if given:
        raise ValueError(f"{why}; leave out {', '.join(given)}.")


def check_output_folder(args: argparse.Namespace) -> None:
    """Raise where an adapter is to be written over the one that is read, or beside the model that it is for."""
    given = {name: folder.resolve() for name, folder in vars(args).items() if name in ("model", "original") and folder}
    if args.out.resolve() in given.values():
        raise ValueError(
            f"{args.out} is the model itself, which would then load with the adapter; choose another folder."
        )
    if "adapter" in args and args.out.resolve() == args.adapter.resolve():
        raise ValueError(f"{args.out} is the adapter itself; choose another folder.")
