"""An adapter folder: the record ``ipca.json``, and reading with every file, key and shape checked first."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ipca._version import __version__
from ipca.io.peft_format import PREFIX, WEIGHTS, factor_keys, from_peft, split_factor, wrappers_around
from ipca.nn.initialization import InitCertificate, check_options
from ipca.nn.layer_kinds import EXPERTS
from ipca.svd import SVDReport
from ipca.window import Window

SIDECAR = "ipca.json"


@dataclass(frozen=True)
class SavedLayer:
    """The record of one layer in ``ipca.json``; ``shape`` is ``(out, in)``, of experts ``(E, out, in)``.

    ``svd`` and ``certificate`` are the fields of :class:`ipca.svd.SVDReport` without the window, and of
    :class:`ipca.nn.InitCertificate`, where they are known; ``bypassed`` is that of :class:`ipca.nn.WindowLayer`;
    ``basis`` is that of the :class:`ipca.Window`.
    """

    kind: str
    shape: tuple[int, ...]
    start: int
    rank: int
    alpha: float
    form: str
    dropout: float
    base_sha256: str | None
    svd: dict[str, Any] | None
    bypassed: bool = False
    certificate: dict[str, Any] | None = None
    basis: str = "weight"
    train: str = "both"
    magnitude: float | str = "sigma"

    @classmethod
    def of(
        cls,
        kind: str,
        shape: Sequence[int],
        window: Window,
        *,
        alpha: float,
        form: str,
        dropout: float,
        base_sha256: str | None,
        report: SVDReport | None,
        bypassed: bool = False,
        certificate: InitCertificate | None = None,
        train: str = "both",
        magnitude: float | str = "sigma",
    ) -> SavedLayer:
        """The record of a layer whose ``window`` is resolved, with what is known of its decomposition and start."""
        svd = None if report is None else svd_record(report)
        start = None if certificate is None else asdict(certificate)
        place = window.index, window.rank
        made = (kind, tuple(shape), *place, alpha, form, dropout, base_sha256, svd, bypassed, start)
        return cls(*made, basis=window.basis, train=train, magnitude=magnitude)

    @property
    def window(self) -> Window:
        return Window(self.start, self.rank, self.basis)

    def report(self) -> SVDReport | None:
        """The report of the decomposition the factors came from."""
        return None if self.svd is None else SVDReport(window=self.window, **self.svd)

    def init_certificate(self) -> InitCertificate | None:
        """The certificate of the start, in ``form`` and on the base weight that has the hash."""
        return None if self.certificate is None else InitCertificate(**self.certificate)


class Factors(NamedTuple):
    """``A, A0 (…, rank, in)``, ``B, B0 (…, out, rank)``, on the CPU."""

    A: Tensor
    B: Tensor
    A0: Tensor
    B0: Tensor


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter as read: layers and their factors by path, and the state of fully trained modules.

    ``labels`` are the names of the classes of its head, by index; empty where they are not known. ``vocab_size`` is
    that of the model it was trained on, where it is known.
    """

    layers: dict[str, SavedLayer]
    factors: dict[str, Factors]
    modules_to_save: dict[str, dict[str, Tensor]]
    labels: tuple[str, ...] = ()
    vocab_size: int | None = None


class Record(NamedTuple):
    """``ipca.json`` as read; ``initial`` says that nothing has been trained since ``ipca init``."""

    layers: dict[str, SavedLayer]
    modules_to_save: list[str]
    adapter_sha256: str | None
    labels: tuple[str, ...]
    vocab_size: int | None
    initial: bool


def svd_record(report: SVDReport) -> dict[str, Any]:
    """``report`` as :attr:`SavedLayer.svd`, without the window, which the record holds already."""
    record = asdict(report)
    del record["window"]
    return record


def sidecar(
    layers: Mapping[str, SavedLayer],
    adapter_sha256: str | None,
    modules_to_save: Sequence[str],
    labels: Sequence[str] = (),
    vocab_size: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The contents of ``ipca.json``.

    Args:
        layers: by path.
        adapter_sha256: of the file of factors; None where it is not known yet.
        modules_to_save: paths of fully trained modules.
        labels: names of the model's classes, by index.
        vocab_size: number of tokens of the model, where it has a vocabulary.
        more: further entries, such as of PEFT's adapters, or ``initial=True`` before any training.
    """
    return {
        "format": 1,
        "versions": {"ipca": __version__, "torch": torch.__version__},
        **more,
        "adapter_sha256": adapter_sha256,
        "modules_to_save": list(modules_to_save),
        **({"labels": list(labels)} if labels else {}),
        **({"vocab_size": vocab_size} if vocab_size else {}),
        "layers": {name: asdict(layer) for name, layer in layers.items()},
    }


class OtherBaseError(ValueError):
    """A base weight is not the one the adapter was made on; ``fact`` is the message without the way around it."""

    def __init__(self, fact: str) -> None:
        super().__init__(fact)
        self.fact = fact

    def __str__(self) -> str:
        return f"{self.fact}, or pass check_base=False if you know that they fit."


class OtherModelError(ValueError):
    """The model lacks a module of the adapter; ``fact`` is the message without the way around it."""

    def __init__(self, fact: str) -> None:
        super().__init__(f"{fact}; load the base in the class that the adapter was trained in.")
        self.fact = fact


def other_base(name: str, was: str | None, here: str | None) -> str:
    """The message for a layer whose base weight has another hash than the adapter records."""
    dtypes = [str(digest).partition("-")[0] for digest in (here, was)]
    cause = f"it is {dtypes[0]} here and was {dtypes[1]}" if dtypes[0] != dtypes[1] else "its values differ"
    return f"{name}: this is not the base weight the adapter was made on ({cause}). Load the original base"


def read_adapter(folder: str | os.PathLike[str], *, modules_to_save: bool = True) -> AdapterFolder:
    """Read the adapter that :func:`ipca.save_adapter` wrote.

    Args:
        folder: holds the adapter's three files.
        modules_to_save: read fully trained modules too; False ignores every tensor that is no layer's factor.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the files do not belong together.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; give the folder of an adapter.")
    for name, hint in (
        (WEIGHTS, "it is no adapter folder"),
        (SIDECAR, "it was not written by ipca.save_adapter; for a stock LoRA see ipca.import_peft"),
    ):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} has no {name}: {hint}.")
    record = _read_sidecar(path / SIDECAR)
    layers, tensors = record.layers, read_tensors(path / WEIGHTS)
    if record.adapter_sha256 is not None and file_sha256(path / WEIGHTS) != record.adapter_sha256:
        raise ValueError(
            f"{path / WEIGHTS} is not the file that {SIDECAR} was written with; save the adapter again, or delete "
            f"{SIDECAR} where stock PEFT wrote the file."
        )
    wrappers = wrappers_around({name: layer.kind for name, layer in layers.items()})
    factors = {name: _factors(name, layer, wrappers[name], tensors) for name, layer in layers.items()}
    for name in layers:  # PEFT saves it with an adapted embedding or head; the layer's hash already identifies it
        for part in ("weight", "bias"):
            tensors.pop(f"{PREFIX}{name}.base_layer.{part}", None)
    states = _module_states(tensors, record.modules_to_save) if modules_to_save else {}
    return AdapterFolder(layers, factors, states, record.labels, record.vocab_size)


def read_record(folder: Path) -> Record:
    """What ``ipca.json`` says, without any tensors.

    Raises:
        OSError, ValueError: there is no such file, or a damaged one.
    """
    return _read_sidecar(folder / SIDECAR)


def read_labels(folder: Path) -> tuple[str, ...]:
    """The names of the classes of the head that the adapter in ``folder`` was trained with; empty where none are known.

    Raises:
        ValueError: ``ipca.json`` is damaged.
    """
    return _read_sidecar(folder / SIDECAR).labels if (folder / SIDECAR).is_file() else ()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or a ValueError where it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from None


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a safetensors file; none where it cannot be read."""
    try:
        with safe_open(str(path), "pt") as file:
            names = list(file.keys())
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (OSError, SafetensorError):
        return {}


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _read_sidecar(path: Path) -> Record:
    try:
        record = json.loads(path.read_text())
        if record["format"] != 1:
            raise ValueError(f"format {record['format']} is that of a newer ipca; upgrade it")
        layers = {name: _layer(values) for name, values in record["layers"].items()}
        if not layers:
            raise ValueError("it names no layer")
        if not isinstance(record["modules_to_save"], list):
            raise TypeError(f"modules_to_save is {record['modules_to_save']!r}, not a list")
        labels = record.get("labels", [])
        if not isinstance(labels, list) or not all(isinstance(each, str) for each in labels):
            raise TypeError(f"labels is {labels!r}, not a list of names")
        tokens = record.get("vocab_size")
        if not isinstance(tokens, int | None):
            raise TypeError(f"vocab_size is {tokens!r}, not a number")
        whole, digest, initial = record["modules_to_save"], record["adapter_sha256"], record.get("initial") is True
        return Record(layers, whole, digest, tuple(labels), tokens, initial)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def _layer(values: dict[str, Any]) -> SavedLayer:
    """One layer's record, validated here so that nothing fails while the model is being changed."""
    layer = SavedLayer(**{**values, "shape": tuple(values["shape"])})
    if len(layer.shape) != (3 if layer.kind in EXPERTS else 2):
        raise ValueError(f"shape {layer.shape} does not fit a layer of the kind {layer.kind!r}")
    layer.window.check_fits(layer.shape)
    check_options(
        form=layer.form, dropout=layer.dropout, alpha=layer.alpha, train=layer.train, magnitude=layer.magnitude
    )
    layer.report()
    layer.init_certificate()
    return layer


def _factors(name: str, layer: SavedLayer, wrappers: int, tensors: dict[str, Tensor]) -> Factors:
    """Take the layer's two tensors out of ``tensors`` and split them."""
    out, inner = layer.shape[-2:]
    experts = math.prod(layer.shape[:-2])
    r = 2 * layer.rank * experts
    pair = []
    for key, shape in zip(factor_keys(name, layer.kind, wrappers), ((r, inner), (out, r)), strict=True):
        if key not in tensors:
            raise ValueError(f"{WEIGHTS} has no tensor {key}.")
        tensor = tensors.pop(key)
        if tensor.ndim < 2 or tuple(tensor.flatten(1).shape) != shape:  # a convolution's kernel lies behind `in`
            raise ValueError(f"{key} has shape {tuple(tensor.shape)}, but {SIDECAR} says {shape}.")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{WEIGHTS}: {key} holds NaN or Inf; take a checkpoint from before.")
        pair.append(tensor)
    (A, A0), (B, B0) = split_factor("A", pair[0], experts), split_factor("B", pair[1], experts)
    return Factors(*from_peft(layer.kind, layer.shape, A, B), *from_peft(layer.kind, layer.shape, A0, B0))


def _module_states(tensors: dict[str, Tensor], names: list[str]) -> dict[str, dict[str, Tensor]]:
    """The states of fully trained modules by path, from the tensors that are no factors."""
    modules_to_save: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for key, value in tensors.items():
        owner = next((name for name in names if key.startswith(f"{PREFIX}{name}.")), None)
        if owner is None:
            raise ValueError(f"{WEIGHTS} holds {key}, which belongs to no layer of the adapter.")
        if bool(value.isnan().any()):  # Inf may be in a mask
            raise ValueError(f"{WEIGHTS}: {key} holds NaN; take a checkpoint from before.")
        modules_to_save[owner][key.removeprefix(f"{PREFIX}{owner}.")] = value
    return modules_to_save
