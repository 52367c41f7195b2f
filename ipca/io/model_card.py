"""The model card of an adapter folder: README.md with the Hub's front matter, made from the folder's files."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ipca._atomic import staged_files
from ipca.io.adapter_folder import SIDECAR, AdapterFolder, read_adapter
from ipca.io.model_folder import class_of_adapter
from ipca.io.peft_format import CONFIG
from ipca.model.targets import few

CARD = "README.md"
_MARK = "<!-- written by ipca.write_model_card -->"
_HUB_NAME = r"[\w.-]+/[\w.-]+"
_LOADING = """\
## Loading

With stock PEFT, on the original base model:

```python
model = peft.PeftModel.from_pretrained(model, "path/to/this/folder")
```

With ipca, to continue training:

```python
model = ipca.load_adapter(model, "path/to/this/folder")
```"""


def write_model_card(
    folder: str | os.PathLike[str],
    *,
    data: str | None = None,
    metrics: Mapping[str, float | str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write ``folder/README.md``: base, windows, ranks, how exact they are, versions, and how to load the adapter.

    Args:
        folder: written by :func:`ipca.save_adapter`. Everything but ``data`` and ``metrics`` is read from its files;
            nothing is looked up elsewhere.
        data: what the adapter was trained on, as Markdown.
        metrics: measured values, shown as a table, such as ``{"accuracy": 0.77}``.
        overwrite: replace a README.md that this function did not write.

    Returns:
        The path of the card.

    Raises:
        FileNotFoundError, ValueError: ``folder`` is no adapter, or is damaged, as :func:`ipca.load_adapter`.
        FileExistsError: it holds another README.md; nothing has changed.
        OSError: ``folder`` cannot be written; nothing has changed.
    """
    path = Path(folder)
    adapter = read_adapter(path)
    config, versions = _config(path / CONFIG), _config(path / SIDECAR).get("versions", {})
    card = path / CARD
    if card.exists() and not overwrite and _MARK not in card.read_text(encoding="utf-8", errors="replace"):
        raise FileExistsError(f"{card} was not written by this function; pass overwrite=True to replace it.")
    base = " ".join(str(config.get("base_model_name_or_path") or "an unnamed base model").split())
    parts = [_front_matter(base), _MARK, _head(base, adapter), _layers(adapter), _exactness(adapter), _LOADING]
    if adapter.labels:
        parts.insert(-1, _classes(adapter.labels, path))
    if data:
        parts.append(f"## Data\n\n{data.strip()}")
    if metrics:
        parts.append("## Results\n\n" + _table(("measured", "value"), [(k, _number(v)) for k, v in metrics.items()]))
    parts.append("## Versions\n\n" + _table(("package", "version"), list(versions.items())))
    with staged_files(path) as stage:
        (stage / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return card


def warn_of_card(folder: str | os.PathLike[str]) -> None:
    """Warn where ``folder``, into which an adapter was saved, has a card of :func:`write_model_card` from before."""
    card = Path(folder) / CARD
    if card.is_file() and _MARK in card.read_text(encoding="utf-8", errors="replace"):
        words = f"{card} describes the adapter that was saved here before; write the card again."
        warnings.warn(words, RuntimeWarning, stacklevel=3)


def _config(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} has no {path.name}: it is no adapter folder.") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path} is damaged: it holds {type(record).__name__}, not an object.")
    return record


def _front_matter(base: str) -> str:
    """YAML for the Hub, which accepts only its own names as ``base_model``; JSON strings are YAML."""
    on_hub = re.fullmatch(_HUB_NAME, base) is not None and not Path(base).exists()
    named = [f"base_model: {json.dumps(base)}"] if on_hub else []
    tags = ["ipca", "lora", "peft", *([f"base_model:adapter:{base}"] if on_hub else [])]
    lines = [*named, "library_name: peft", "tags:", *(f"- {json.dumps(tag)}" for tag in tags)]
    return "\n".join(["---", *lines, "---"])


def _head(base: str, adapter: AdapterFolder) -> str:
    trained = sum(
        sum(getattr(adapter.factors[name], part).numel() for part in "AB" if layer.train in ("both", part))
        for name, layer in adapter.layers.items()
    )
    more = ", and fully trained modules beside them" if adapter.modules_to_save else ""
    return (
        f"# Adapter of {base}\n\n"
        f"A window of {_what(adapter)} was trained ([arXiv 2602.03493]"
        f"(https://arxiv.org/abs/2602.03493)): {trained:,} parameters in {len(adapter.layers)} layers{more}. "
        "The file is a LoRA of twice the rank for the original base."
    )


def _what(adapter: AdapterFolder) -> str:
    """What the windows count."""
    counted = {
        "weight": "the singular components of each adapted weight",
        "inputs": "the directions of each adapted layer's inputs",
    }
    bases = {layer.basis for layer in adapter.layers.values()}
    return " or ".join(words for basis, words in counted.items() if basis in bases)


def _layers(adapter: AdapterFolder) -> str:
    names = ("kind", "shape", "start", "rank", "basis", "alpha", "form", "train")
    kinds = Counter(tuple(getattr(layer, name) for name in names) for layer in adapter.layers.values())
    one_factor = any(layer.train != "both" for layer in adapter.layers.values())
    rows = [
        (
            count,
            kind,
            " × ".join(map(str, shape)),
            f"[{start}, {start + rank}) of " + (f"{shape[-1]} inputs" if basis == "inputs" else str(min(shape[-2:]))),
            f"{alpha:g}",
            form,
            *([train] if one_factor else []),
        )
        for (kind, shape, start, rank, basis, alpha, form, train), count in kinds.items()
    ]
    head = ("layers", "kind", "weight", "window", "alpha", "form", *(["trains"] if one_factor else []))
    return "## Windows\n\n" + _table(head, rows)


def _classes(labels: tuple[str, ...], folder: Path) -> str:
    """The classes, and how users of PEFT have them: its files name none."""
    return (
        f"## Classes\n\nIn this order: {few([_code(name) for name in labels], 20)}. The base with them:\n\n"
        "```python\nimport json\nimport pathlib\n\nimport transformers\n\n"
        f'labels = json.loads(pathlib.Path("path/to/this/folder/{SIDECAR}").read_text())["labels"]\n'
        f"model = transformers.{class_of_adapter(folder) or 'AutoModel'}.from_pretrained(\n"
        '    "path/to/base", id2label=dict(enumerate(labels)), ignore_mismatched_sizes=True\n)\n```'
    )


def _exactness(adapter: AdapterFolder) -> str:
    """The residuals and certificates of the windows, from the reports that the layers were saved with."""
    reports = [report for layer in adapter.layers.values() if (report := layer.report()) is not None]
    if not reports:
        return "The folder does not say how the windows were found."
    proven = sum(report.certified for report in reports)
    return (
        f"Window SVD: largest relative residual {max(report.residual for report in reports):.1e}; the indices of "
        f"{proven} of {len(adapter.layers)} windows are proven by inertia counts or a full decomposition."
    )


def _table(head: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _code(name: str) -> str:
    return "`" + _cell(name).replace("`", "'") + "`"


def _number(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
