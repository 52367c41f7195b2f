"""The files of a run's folder, and hashes of what a run reads, by which it is known again."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from ipca.io.adapter_folder import file_sha256
from ipca.io.model_folder import WEIGHT_ENDINGS
from ipca.io.output_folder import is_adapter_file, is_weights
from ipca.train.settings import RUN, TrainSettings
from ipca.train.sources import find_source

CURVE, SAMPLES, CHECKPOINTS = "curve.csv", "keep.safetensors", "checkpoints"
BESIDE = (RUN, CURVE, SAMPLES, "README.md", "curve.png", "curve.svg", "report.html")
"""What a run writes beside the adapter and the tokenizer or image processor."""
_PROCESSOR = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "preprocessor_config.json", "processor_config.json"),
)


def is_run_file(name: str) -> bool:
    """Whether ``name`` is that of something a run writes into its folder."""
    return is_weights(name) or name in (*BESIDE, *_PROCESSOR, CHECKPOINTS)


def input_digests(settings: TrainSettings) -> dict[str, str]:
    """SHA-256 of what the run reads from this disk, by the name of the setting: the model, and files of data.

    Files count by their place in their folder, too: that of an image says its class.
    """
    found = {}
    for name in ("model", "data", "keep", "held_out"):
        given = getattr(settings, name)
        files = _files(name, Path(given)) if isinstance(given, str) else []
        if files:
            folder = Path(given) if Path(given).is_dir() else Path(given).parent
            parts = "\n".join(f"{path.relative_to(folder).as_posix()} {_sha256(path, *_state(path))}" for path in files)
            found[name] = hashlib.sha256(parts.encode()).hexdigest()[:16]
    return found


def adapter_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of the adapter in ``folder``, by its name."""
    return {path.name: file_sha256(path)[:16] for path in sorted(folder.iterdir()) if is_adapter_file(path.name)}


def _state(path: Path) -> tuple[int, int]:
    return path.stat().st_size, path.stat().st_mtime_ns


@cache
def _sha256(path: Path, size: int, modified: int) -> str:
    """The hash of a file of this ``size`` that was ``modified`` at this time: a model is read once."""
    return file_sha256(path)


def _files(name: str, path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():  # an id on the Hub
        return []
    if name != "model":
        source = find_source(str(path))
        return [*source.files, *source.held_out]
    endings = (*WEIGHT_ENDINGS, ".json", ".model", ".jinja")
    files = [each for each in sorted(path.iterdir()) if each.is_file()]
    return [each for each in files if each.name.endswith(endings) or each.name in _PROCESSOR]
