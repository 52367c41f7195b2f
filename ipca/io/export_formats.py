"""export: an adapted model in formats that programs without ipca read."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ipca._atomic import staged_files, staged_folder
from ipca._dtensor import gathered, is_sharded_model, is_writer, write_once
from ipca.io.adapter import collect_adapter
from ipca.io.output_folder import TRUNCATION, check_not_read, check_output, is_adapter_file
from ipca.io.peft_format import (
    PREFIX,
    AdapterContents,
    LayerFormat,
    adapter_state,
    bypassed_words,
    check_finite,
    formats,
    readable_config,
    warn_of_reads,
    write_peft,
)
from ipca.io.serving import (
    check_servable,
    moved_factors,
    serving_rank,
    warn_rank,
    warn_servers,
    write_mlx,
    write_serve,
)
from ipca.model.apply import adapted_layers
from ipca.model.merge import check_not_offloaded
from ipca.model.running_statistics import warn_moved_statistics
from ipca.model.targets import few
from ipca.model.transformers_models import plain_key
from ipca.model.vocabulary import warn_of_vocabulary
from ipca.nn.layer_kinds import EXPERTS, from_matrix
from ipca.nn.quantized_linear import QuantizedLinearPC

FORMATS = ("peft", "serve", "mlx", "residual", "truncated")


def export(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    format: str = "peft",
    base_model: str | None = None,
    rank: int | None = None,
    overwrite: bool = False,
) -> dict[str, float]:
    """Write the adapter for programs without ipca.

    >>> model = ipca.apply_pc(nn.Sequential(nn.Linear(64, 32)), rank=4, progress=False)
    >>> ipca.export(model, "for-peft")
    {}
    >>> sorted(path.name for path in Path("for-peft").iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']

    Args:
        model: has adapted layers; unchanged.
        folder: where to write: without weights and adapters, or with the format ``"residual"`` new or empty.
        format: ``"peft"``: a stock PEFT LoRA of rank ``2 rank`` for the *original* base, as :func:`ipca.save_adapter`
            writes but without ``ipca.json``. ``"serve"``: the same function as a LoRA that all servers read alike: one
            rank ``r = lora_alpha``, scale 1, no patterns, no rsLoRA. ``"mlx"``: that LoRA in the format of mlx-lm.
            ``"residual"``: ``folder/base``, the whole model with ``W_res`` in place of ``W``, and ``folder/adapter``, a
            LoRA of rank ``rank`` that is right only on this base (on the original base it gives wrong results without
            any message). ``"truncated"``: the stock LoRA of rank ``rank`` for the
            original base that is nearest to the change of each weight; ``truncation.json`` beside it has the relative
            errors.
        base_model: for PEFT's ``base_model_name_or_path``; default ``model.name_or_path``, or ``folder/base``.
        rank: only for the format ``"truncated"``, at least 1.
        overwrite: replace weights and adapters that ``folder`` holds.

    Returns:
        ``‖ΔW − lora_B lora_A‖_F / ‖ΔW‖_F`` by layer for ``"truncated"``; empty for the others, which are exact up to
        rounding.

    Warns:
        RuntimeWarning: as :func:`ipca.save_adapter`; for ``"serve"``, a rank that servers allow only on request; for
            ``"residual"``, layers with a frozen factor, which PEFT trains too where training goes on.

    Raises:
        ValueError: as :func:`ipca.save_adapter`, a layer that the model does not call, an unknown ``format``, a
            ``rank`` that does not go with it, (serve, mlx) modules that train whole or layers that the program
            cannot take, or ``folder`` is where the model was loaded from.
        FileExistsError: ``folder`` holds weights or an adapter, and not ``overwrite``; nothing has changed.
        OSError: ``folder`` cannot be written; nothing has changed.
    """
    _check_arguments(format, rank)
    if format == "residual":
        _check_quantized(model)
        check_not_offloaded(adapted_layers(model))
    inside = overwrite and format == "residual"
    check_not_read(folder, model=[getattr(model, "name_or_path", None)], residual=inside)
    write_once(model, partial(check_output, folder, whole=format == "residual", overwrite=overwrite))
    contents = collect_adapter(model)
    if format in ("serve", "mlx"):
        check_servable(contents)
    words = bypassed_words(model, contents.layers, residual=format == "residual")
    if words:
        raise ValueError(f"{words}.")
    if format == "residual":
        unseen = [name for name, layer in contents.layers.items() if not layer.was_called]
        warn_of_reads(model, unseen, "run the model once before exporting, exclude them, or export in another format")
        base_model = base_model or str(Path(folder).absolute() / "base")
    moved = moved_factors(contents.layers) if format in ("serve", "mlx") else {}
    config = {} if format == "mlx" else _config(model, contents, format, rank, base_model, moved)
    tensors = adapter_state(model, contents, doubled=format != "residual")
    base = residual_state_dict(model) if format == "residual" else {}
    scalings = {name: layer.scaling for name, layer in contents.layers.items()}
    errors: dict[str, float] = {}

    def write() -> None:
        check_finite(contents, tensors)
        if format == "residual":
            _write_residual(Path(folder), model, tensors, base, config, overwrite)
            return
        with staged_files(folder, replaced=is_adapter_file) as stage:
            if format == "serve":
                write_serve(stage, model, contents, tensors, config, moved)
            elif format == "mlx":
                write_mlx(stage, model, contents, tensors, moved)
            elif rank is None:
                write_peft(stage, tensors, config)
            else:
                errors.update(_write_truncated(stage, tensors, scalings, config, rank))

    write_once(model, write)
    if format == "residual" and is_writer(model):
        _warn_frozen(contents)
    if format == "serve":
        warn_rank(serving_rank(contents.layers, moved))
    elif format != "mlx" and is_writer(model):
        warn_servers(Path(folder) / "adapter" if format == "residual" else folder)
    if format != "residual" and is_writer(model):  # whose base has them
        warn_moved_statistics(model, contents.modules_to_save)
        warn_of_vocabulary(model, contents.modules_to_save, base_model)
    return errors


def _check_arguments(format: str, rank: int | None) -> None:
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {format!r}.")
    if format == "truncated" and rank is None:
        raise ValueError("the format 'truncated' needs a rank, such as that of the window.")
    if format != "truncated" and rank is not None:
        raise ValueError(f"a rank is only for the format 'truncated'; got {format!r} and rank {rank}.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be an int of at least 1, got {rank!r}.")


def _check_quantized(model: nn.Module) -> None:
    """Raise where there is no ``W_res`` in floats to write."""
    for name, layer in adapted_layers(model).items():
        if isinstance(layer, QuantizedLinearPC):
            raise ValueError(
                f"{name} is quantized ({layer.kind}), and W_res would have to be quantized again; adapt the "
                "model before it is quantized, export that, and quantize its base."
            )


def _warn_frozen(contents: AdapterContents) -> None:
    """Warn where PEFT would train a factor that is frozen here: a stock LoRA does not say which one trains."""
    frozen = [name for name, layer in contents.layers.items() if layer.trained != "both"]
    if frozen:
        words = (
            f"a stock LoRA cannot say which factor is frozen, as in {few(frozen)}: the function is the same, but PEFT "
            "trains both factors where training goes on. save_adapter keeps the frozen one."
        )
        warnings.warn(words, RuntimeWarning, stacklevel=3)


def _write_residual(
    folder: Path,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    base: dict[str, Tensor],
    config: Mapping[str, Any],
    overwrite: bool,
) -> None:
    with staged_files(folder, replaced=is_adapter_file) if overwrite else staged_folder(folder) as stage:
        (stage / "base").mkdir()
        (stage / "adapter").mkdir()
        _write_base(model, base, stage / "base")
        write_peft(stage / "adapter", tensors, config)


@torch.no_grad()
def residual_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain model with ``W_res`` in place of every adapted ``W``.

    For a sharded model every process must call it, and only rank 0 gets the tensors, full and on the CPU.
    """
    layers = adapted_layers(model)
    ours = tuple(f"{name}.{key}" for name in layers for key in ("lora_", "base_weight", "_extra_state"))
    state = {plain_key(model, k): value for k, value in model.state_dict().items() if not k.startswith(ours)}
    if is_sharded_model(model):
        state = gathered(state.items(), keep=is_writer(model))
    for name, layer in layers.items():
        weight = layer.residual_weight()
        if is_writer(model):
            key = name if layer.kind in EXPERTS else f"{name}.weight"
            state[key] = from_matrix(layer.kind, weight, layer.base_weight.shape).contiguous()
    return state


def _write_base(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    save_pretrained = getattr(model, "save_pretrained", None)
    if callable(save_pretrained):
        save_pretrained(folder, state_dict=state)
    else:
        # A copy of each tensor: safetensors refuses tensors that share memory, and tied weights do.
        save_file({k: v.cpu().contiguous().clone() for k, v in state.items()}, folder / "model.safetensors")


def _config(
    model: nn.Module,
    contents: AdapterContents,
    format: str,
    rank: int | None,
    base_model: str | None,
    moved: Mapping[str, str],
) -> dict[str, Any]:
    """PEFT's configuration of the adapter in the ``format``."""
    layers = formats(contents, doubled=format != "residual")
    if rank is not None:
        layers = {name: _narrowed(name, layer, rank) for name, layer in layers.items()}
    if format == "serve":
        one = serving_rank(contents.layers, moved)
        layers = {name: layer._replace(r=one, alpha=one) for name, layer in layers.items()}
    return readable_config(model, layers, contents.modules_to_save, base_model, others=True)


def _narrowed(name: str, layer: LayerFormat, rank: int) -> LayerFormat:
    """The format of a layer that is truncated to ``rank``, its scaling folded in."""
    if layer.kind in EXPERTS:
        raise ValueError(f"{name} has no one pair of factors (lora_A, lora_B) to truncate; use the format 'peft'.")
    width = min(rank, layer.r, *layer.shape)
    return layer._replace(r=width, alpha=width)


def _write_truncated(
    folder: Path, tensors: Mapping[str, Tensor], scalings: Mapping[str, float], config: Mapping[str, Any], rank: int
) -> dict[str, float]:
    """Write PEFT's two files and the relative errors, which are returned too."""
    low, errors = truncated(tensors, scalings, rank)
    write_peft(folder, low, config)
    (folder / TRUNCATION).write_text(json.dumps({"rank": rank, "relative_error": errors}, indent=2) + "\n")
    return errors


def truncated(
    tensors: Mapping[str, Tensor], scalings: Mapping[str, float], rank: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors of an adapter file with each pair of factors truncated to ``rank`` and the scaling folded in.

    ``lora_B lora_A ≈ scaling · (B A − B0 A0)``: the first components of the SVD of the right side, which are the
    nearest of their rank (Eckart, Young), each factor with ``√S``.

    Args:
        tensors: ``lora_A = [A; A0] (2r, in)``, ``lora_B = [B, −B0] (out, 2r)`` of every layer under PEFT's keys, with
            the axes of a convolution behind ``in`` and ``out``; and whatever else the file holds, which stays.
        scalings: of every layer, by its path.
        rank: of the result; a layer whose change of the weight has no higher rank stays exact, and its factors may be
            narrower.

    Returns:
        The tensors, and ``‖ΔW − lora_B lora_A‖_F / ‖ΔW‖_F`` by path, measured on the rounded factors; 0 where nothing
        was trained.

    Raises:
        ValueError: a layer is a stack of weights, which PEFT's file holds as one pair of factors for all experts.
    """
    cut, errors = dict(tensors), {}
    for name, scaling in scalings.items():
        keys = [key for key in tensors if key.removeprefix(PREFIX) in _factor_names(name)]
        if len(keys) != 2:
            raise ValueError(f"{name} has no one pair of factors (lora_A, lora_B) to truncate; use the format 'peft'.")
        key_A, key_B = sorted(keys)
        A, B = tensors[key_A], tensors[key_B]
        low_A, low_B = _nearest(A.flatten(1), B.flatten(1), scaling, rank)
        errors[name] = _relative_error(A.flatten(1), scaling * B.flatten(1).double(), low_A, low_B)
        cut[key_A] = low_A.reshape(-1, *A.shape[1:])
        cut[key_B] = low_B.reshape(B.shape[0], -1, *B.shape[2:])
    return cut, errors


def _factor_names(name: str) -> set[str]:
    return {
        f"{name}.{kind}_{side}{end}" for kind, end in (("lora", ".weight"), ("lora_embedding", "")) for side in "AB"
    }


def _nearest(A: Tensor, B: Tensor, scaling: float, rank: int) -> tuple[Tensor, Tensor]:
    """``lora_A (k, in), lora_B (out, k)`` in the dtype of ``A``, ``k`` the smallest of ``rank, 2r, in, out``."""
    Q, left = torch.linalg.qr(scaling * B.double())
    P, right = torch.linalg.qr(A.mT.double())
    U, S, Vh = torch.linalg.svd(left @ right.mT, full_matrices=False)
    S = S * (_noise(B * scaling, A) < S)
    root = S[:rank].sqrt()
    return (root[:, None] * (Vh[:rank] @ P.mT)).to(A.dtype), (Q @ (U[:, :rank] * root)).to(A.dtype)


def _relative_error(A: Tensor, B: Tensor, low_A: Tensor, low_B: Tensor) -> float:
    """``‖B A − low_B low_A‖_F / ‖B A‖_F`` in float64, without forming either product."""
    size = _norm(B.double(), A.double())
    difference = _norm(torch.cat([B.double(), -low_B.double()], dim=1), torch.cat([A.double(), low_A.double()]))
    return difference / size if size > _noise(B, A) else 0.0


def _noise(B: Tensor, A: Tensor) -> float:
    """A bound on ``‖B A‖`` after rounding where the halves of the factors cancel: nothing was trained."""
    return 4 * torch.finfo(torch.float64).eps * B.double().norm().item() * A.double().norm().item()


def _norm(B: Tensor, A: Tensor) -> float:
    """``‖B A‖_F``."""
    return torch.linalg.norm(torch.linalg.qr(B, mode="r").R @ torch.linalg.qr(A.mT, mode="r").R.mT).item()
