"""Reading an adapter folder: every file, key and shape is checked before anybody sees a tensor."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ipca.io.peft_format import PREFIX, WEIGHTS, factor_keys, split_factors
from ipca.nn import check_options
from ipca.svd import SVDReport
from ipca.window import Window

SIDECAR = "ipca.json"


@dataclass(frozen=True)
class SavedLayer:
    """What ``ipca.json`` says of one layer; ``shape`` is ``(out, in)``."""

    kind: str
    shape: tuple[int, int]
    start: int
    rank: int
    alpha: float
    form: str
    dropout: float
    base_sha256: str | None
    svd: dict[str, Any] | None

    @property
    def window(self) -> Window:
        return Window(self.start, self.rank)

    def report(self) -> SVDReport | None:
        """The report of the decomposition the factors came from."""
        return None if self.svd is None else SVDReport(window=self.window, **self.svd)


class Factors(NamedTuple):
    """``A, A0 (rank, in)``, ``B, B0 (out, rank)``, on the CPU."""

    A: Tensor
    B: Tensor
    A0: Tensor
    B0: Tensor


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter as read: layers and their factors by path, and the state of modules that were trained whole."""

    layers: dict[str, SavedLayer]
    factors: dict[str, Factors]
    whole: dict[str, dict[str, Tensor]]


def read_adapter(folder: str | os.PathLike[str]) -> AdapterFolder:
    """Read what :func:`ipca.save_adapter` wrote.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the files do not belong together.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; give the folder that save_adapter wrote.")
    for name, hint in ((WEIGHTS, "it is no adapter folder"), (SIDECAR, "it was not written by ipca.save_adapter")):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} has no {name}: {hint}.")
    layers, names, digest = _read_sidecar(path / SIDECAR)
    try:
        tensors = load_file(path / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS} is damaged or truncated: {error}") from None
    if file_sha256(path / WEIGHTS) != digest:
        raise ValueError(f"{path / WEIGHTS} is not the file that {SIDECAR} was written with; save the adapter again.")
    factors = {name: _factors(name, layer, tensors) for name, layer in layers.items()}
    return AdapterFolder(layers, factors, _whole(tensors, names))


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _read_sidecar(path: Path) -> tuple[dict[str, SavedLayer], list[str], str]:
    try:
        record = json.loads(path.read_text())
        if record["format"] != 1:
            raise ValueError(f"format {record['format']} is that of a newer ipca; upgrade it")
        layers = {name: _layer(values) for name, values in record["layers"].items()}
        if not layers:
            raise ValueError("it names no layer")
        if not isinstance(record["modules_to_save"], list):
            raise TypeError(f"modules_to_save is {record['modules_to_save']!r}, not a list")
        return layers, record["modules_to_save"], record["adapter_sha256"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def _layer(values: dict[str, Any]) -> SavedLayer:
    """One layer's record; whatever is wrong with it must fail here and not when the model is being changed."""
    layer = SavedLayer(**{**values, "shape": tuple(values["shape"])})
    out_features, in_features = layer.shape
    layer.window.resolve(min(out_features, in_features))
    check_options(form=layer.form, dropout=layer.dropout, alpha=layer.alpha)
    layer.report()
    return layer


def _factors(name: str, layer: SavedLayer, tensors: dict[str, Tensor]) -> Factors:
    """Take the layer's two tensors out of ``tensors`` and split them."""
    out, inner = layer.shape
    wanted = ((2 * layer.rank, inner), (out, 2 * layer.rank))
    pair = []
    for key, shape in zip(factor_keys(name), wanted, strict=True):
        if key not in tensors:
            raise ValueError(f"{WEIGHTS} has no tensor {key}.")
        tensor = tensors.pop(key)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{key} has shape {tuple(tensor.shape)}, but {SIDECAR} says {shape}.")
        pair.append(tensor)
    return Factors(*split_factors(*pair))


def _whole(tensors: dict[str, Tensor], names: list[str]) -> dict[str, dict[str, Tensor]]:
    """What is left in the file: the state of whole modules, by the module's path."""
    whole: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for key, value in tensors.items():
        owner = next((name for name in names if key.startswith(f"{PREFIX}{name}.")), None)
        if owner is None:
            raise ValueError(f"{WEIGHTS} holds {key}, which belongs to no layer of the adapter.")
        whole[owner][key.removeprefix(f"{PREFIX}{owner}.")] = value
    return whole
