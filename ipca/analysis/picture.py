"""An empty matplotlib figure that is written to a file once it has been drawn; pyplot and its state are left alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ipca._atomic import staged_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def picture(path: str | os.PathLike[str], size: tuple[float, float] = (6.4, 4.8)) -> Iterator[Figure]:
    """A figure to draw on, which is written to ``path`` when the block succeeds.

    Args:
        path: its ending names the format: ``.png``, ``.pdf``, ``.svg``.
        size: width and height in inches.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: ``path`` has no ending, or that of an unknown format.
        OSError: ``path`` cannot be written; what was there stays.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a picture needs matplotlib; run: pip install 'ipca-lora[plot]'") from None
    target = Path(path).absolute()
    if not target.suffix:  # matplotlib would choose a format, and write to another path
        raise ValueError(f"{os.fspath(path)!r} does not say the format; end it in .png, .pdf or .svg.")
    figure = Figure(figsize=size, layout="constrained")
    yield figure
    with staged_files(target.parent) as stage:
        figure.savefig(stage / target.name, dpi=150)
