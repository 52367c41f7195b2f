"""``ipca inspect`` for an adapter folder: layers, windows, certificates, sizes and the base it is for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from ipca.io.adapter_folder import SIDECAR, read_adapter
from ipca.io.peft_format import CONFIG, WEIGHTS
from ipca.io.peft_lora import read_stock
from ipca.io.serving import server_faults

Record = dict[str, object]
States = dict[str, dict[str, Tensor]]


def is_adapter(folder: Path) -> bool:
    """Whether ``folder`` holds an adapter and no model."""
    names = (SIDECAR, CONFIG, WEIGHTS)
    return any((folder / name).is_file() for name in names) and not (folder / "config.json").is_file()


def adapter_record(folder: Path) -> Record:
    """The contents of an adapter folder as one record; every tensor is checked.

    Raises:
        FileNotFoundError, ValueError: as :func:`ipca.load_adapter`, or as :func:`ipca.import_peft` for a folder without
            ``ipca.json``.
    """
    rows, states, base = _ours(folder) if (folder / SIDECAR).is_file() else _stock(folder)
    heads = sum(value.numel() for state in states.values() for key, value in state.items() if _trains(key))
    return {
        "kind": "ipca" if (folder / SIDECAR).is_file() else "stock LoRA",
        "base": base,
        "servers": server_faults(_config(folder)),
        "layers": rows,
        "modules_to_save": list(states),
        "totals": {
            "layers": len(rows),
            "trainable": sum(row["trainable"] for row in rows) + heads,
            "uncertified": [row["layer"] for row in rows if row.get("certified") is False],
            "file_bytes": (folder / WEIGHTS).stat().st_size,
        },
    }


def adapter_table(record: Any) -> str:
    """The record as a table of text."""
    ours, totals = record["kind"] == "ipca", record["totals"]
    lines = [
        f"{'layer':40} {'shape':>14} {'rank':>5} {'scaling':>8} {'window':>14} {'of':>6} {'form':>9} {'residual':>9}"
    ]
    for row in record["layers"]:
        window = "[{}, {})".format(*row["window"]) if ours else "–"
        residual = f"{row['residual']:9.1e}" if row.get("residual") is not None else f"{'–':>9}"
        shape = row["shape"]
        lines.append(
            f"{_short(row['layer'], 40):40} {' × '.join(map(str, shape)):>14} {row['rank']:5} "
            f"{row['scaling']:8.3g} {window:>14} {_places(row):>6} {row.get('form', '–'):>9} {residual}"
        )
    lines += [f"not certified: {row['layer']}: {row['certificate']}" for row in _uncertified(record["layers"])[:5]]
    lines += [f"fully trained: {', '.join(record['modules_to_save'])}"] * bool(record["modules_to_save"])
    proven = f", {totals['layers'] - len(totals['uncertified'])} windows certified" if ours else ""
    lines.append(
        f"{totals['layers']} layers, {totals['trainable']:,} parameters train{proven}; "
        f"file {mib(totals['file_bytes'])}; base: {record['base'] or 'not named'}"
    )
    if record["servers"]:
        lines.append(f"{record['servers']}; for a server use ipca export --format serve")
    if not ours:
        lines.append("a stock LoRA, without windows; ipca convert looks for them")
    return "\n".join(lines)


def _trains(key: str) -> bool:
    """Whether ``key`` of a state dict is that of a parameter, and not of a normalization's statistics."""
    return key.rpartition(".")[2] not in ("running_mean", "running_var", "num_batches_tracked")


def _ours(folder: Path) -> tuple[list[dict[str, Any]], States, str | None]:
    saved = read_adapter(folder)
    rows = []
    for name, layer in saved.layers.items():
        report = layer.report()
        *experts, out, inner = layer.shape
        rows.append(
            {
                "layer": name,
                "kind": layer.kind,
                "shape": list(layer.shape),
                "rank": layer.rank,
                "scaling": layer.alpha / layer.rank,
                "window": [layer.start, layer.start + layer.rank],
                "basis": layer.basis,
                "train": layer.train,
                "magnitude": layer.magnitude,
                "form": layer.form,
                "trainable": math.prod(experts) * layer.rank * {"both": out + inner, "A": inner, "B": out}[layer.train],
                "certified": None if report is None else report.certified,
                "certificate": None if report is None else report.certificate,
                "residual": None if report is None else report.residual,
                "base_sha256": layer.base_sha256,
            }
        )
    return rows, saved.modules_to_save, _base(folder)


def _stock(folder: Path) -> tuple[list[dict[str, Any]], States, str | None]:
    lora = read_stock(folder)
    rows = [
        {
            "layer": name,
            "shape": [layer.B.shape[0], layer.A.shape[1]],
            "rank": layer.rank,
            "scaling": layer.scaling,
            "trainable": layer.A.numel() + layer.B.numel(),
        }
        for name, layer in lora.layers.items()
    ]
    return rows, lora.modules_to_save, _base(folder)


def _base(folder: Path) -> str | None:
    """The base that PEFT's configuration names, None if it names none."""
    base: str | None = _config(folder).get("base_model_name_or_path")
    return base


def _config(folder: Path) -> dict[str, Any]:
    """PEFT's configuration; empty where it cannot be read."""
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _uncertified(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row.get("certified") is False]


def _places(row: dict[str, Any]) -> str:
    """The number of directions that the window of a layer is one of."""
    shape = row["shape"]
    return f"in {shape[-1]}" if row.get("basis") == "inputs" else str(min(shape[-2:]))


def _short(name: str, width: int) -> str:
    """``name``, its beginning replaced by … where it is longer than ``width``."""
    return name if len(name) <= width else "…" + name[-(width - 1) :]


def mib(size: object) -> str:
    """A number of bytes as MiB, a small one as KiB."""
    assert isinstance(size, int)
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
