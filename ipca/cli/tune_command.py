"""``ipca tune``: the fastest backend and kernel configurations for a model's shapes on this machine's GPU."""

from __future__ import annotations

import argparse
import importlib.util
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ipca.cli.arguments import find_folders
from ipca.io.model_folder import read_config
from ipca.kernels import tables
from ipca.model.settings import AdapterSettings
from ipca.model.targets import find_targets
from ipca.nn.layer_kinds import LINEAR, is_quantized
from ipca.ops.backend import BACKENDS, LinearShape, choose

if TYPE_CHECKING:
    from ipca.device.tune import Cell

Record = dict[str, Any]
Shapes = Counter[tuple[int, int]]
"""How many layers have a weight ``(out, in)``."""


def tune(args: argparse.Namespace) -> tuple[Record, str]:
    """Measure what ``"auto"`` and the kernels choose by, and show what they choose."""
    if not torch.cuda.is_available():
        raise RuntimeError(
            "ipca tune needs a CUDA device, and torch sees none: without one the backend auto has nothing to choose."
        )
    if importlib.util.find_spec("triton") is None:
        raise ImportError("ipca tune measures Triton's kernels; run: pip install triton")
    from ipca.device import tune as measurement

    device = torch.device("cuda", torch.cuda.current_device())
    shapes, dtype = Counter(args.shapes), "bfloat16"
    if args.model is not None:
        find_folders(args)
        shapes, dtype = model_shapes(args.model, args.model_class, min(args.rank))
    forms = measurement.FORMS if args.form == "both" else (args.form,)
    cells = [
        measurement.Cell(M, N, K, R, args.dtype or dtype, args.dropout)
        for N, K in shapes
        for R in args.rank
        if min(N, K) >= R
        for M in args.tokens
    ]
    if not cells:
        raise ValueError(f"no weight takes rank {min(args.rank)}; lower --rank.")
    if args.force:
        measurement.forget(cells, device)
    measurement.measure_configs(cells, device, progress=not args.quiet)
    measurement.measure_backends(cells, device, forms, progress=not args.quiet)
    record = {
        "device": torch.cuda.get_device_name(device),
        "table": str(tables.cache_file(device)),
        "layers": [{"out": N, "in": K, "count": count} for (N, K), count in shapes.items()],
        "rows": [_row(cell, form, mode, device) for cell in cells for form in forms for mode in measurement.MODES],
    }
    return record, report(record)


def model_shapes(folder: Path, model_class: str | None, rank: int) -> tuple[Shapes, str]:
    """The weights of the layers that "all-linear" adapts, and the model's dtype; reads no weights.

    Raises:
        ValueError: no linear layer takes the rank; or as :func:`ipca.io.model_folder.read_config`.
    """
    cls, config = read_config(folder, model_class)
    with torch.device("meta"):
        build = getattr(cls, "_from_config", None) or cls.from_config  # AutoModel has the latter
        model = build(config)
    targets = find_targets(model, AdapterSettings(rank=rank), values=False)
    shapes = Counter(target.shape[-2:] for target in targets if target.kind in LINEAR or is_quantized(target.kind))
    dtype = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return shapes, dtype if dtype in ("float16", "float32") else "bfloat16"  # type: ignore[return-value]


def _row(cell: Cell, form: str, mode: str, device: torch.device) -> Record:
    """What was measured at a cell, and what ``"auto"`` takes there."""
    from ipca.device.tune import MODES, known

    M, N, K, R, dtype, dropout = cell
    shape = LinearShape(device, getattr(torch, dtype), M, N, K, R, form == "intact", dropout > 0, MODES[mode])
    choice = choose("auto", shape)
    found = known(device, cell, form, mode) or {}
    return {**cell._asdict(), "form": form, "mode": mode, "ms": found, "auto": choice.backend, "reason": choice.reason}


def report(record: Record) -> str:
    """The record as a table."""
    counts = {(layer["out"], layer["in"]): layer["count"] for layer in record["layers"]}
    head = f"{'weight':>15} {'layers':>6} {'tokens':>6} {'rank':>4} {'form':8} {'mode':9}"
    lines = [f"{head} {' '.join(f'{name:>9}' for name in BACKENDS)}  auto"]
    for row in record["rows"]:
        times = " ".join(f"{row['ms'][name]:9.3f}" if name in row["ms"] else f"{'—':>9}" for name in BACKENDS)
        weight = f"{row['N']} × {row['K']}"
        lines.append(
            f"{weight:>15} {counts[row['N'], row['K']]:6} {row['M']:6} {row['R']:4} {row['form']:8} {row['mode']:9} "
            f"{times}  {row['auto']}"
        )
    lines.append(f"milliseconds on {record['device']}, kept in {record['table']}")
    unchecked = {row["reason"] for row in record["rows"] if "ipca doctor" in row["reason"]}
    return "\n".join([*lines, *sorted(unchecked)])
