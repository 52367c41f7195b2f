"""What stock PEFT and transformers make of saved adapters; runs in a process that cannot import ipca."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.zoo.models.tiny import Architecture, build
from tests.zoo.outputs import difference, run
from tests.zoo.rows import Row, reason

TOL = 1e-5


def loaded(base: nn.Module, adapter: Path) -> Any:
    """The base with the adapter, by PEFT."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, adapter)


def merged(base: nn.Module, adapter: Path) -> nn.Module:
    """The same, merged."""
    return loaded(base, adapter).merge_and_unload()


def by_transformers(base: Any, adapter: Path) -> nn.Module:
    """The base with the adapter, by transformers."""
    base.load_adapter(str(adapter))
    return base


READERS = {"stock": (loaded, TOL), "stock_merge": (merged, 5 * TOL), "stock_transformers": (by_transformers, TOL)}


def stock_rows(name: str, architecture: Architecture, folder: Path) -> Iterator[Row]:
    """A row for each reader of each adapter that was left in ``folder``."""
    assert sys.modules.get("ipca", "") is None, "this is about a process without ipca"
    for path in sorted(folder.glob("*.pt")):
        case = torch.load(path, weights_only=False)
        told = f"; told: {' '.join(case['told'])}" if case["told"] else ""
        for reader, (read, tol) in READERS.items():
            if read is by_transformers and (architecture.package != "transformers" or path.stem != "linear.intact"):
                continue
            check = f"{path.stem}.{reader}"
            try:
                model = read(build(architecture)[0], folder / "adapters" / path.stem).eval()
                off = difference(run(model, case["inputs"]), case["outputs"])
            except Exception as error:
                yield Row(name, check, "error", reason(error) + told)
                continue
            tol = max(tol, 2 * case["noise"])
            yield Row(name, check, "ok") if off <= tol else Row(name, check, "wrong", f"differs by {off:.2g}{told}")
