"""Initial factors of a layer, the certificate that they leave its function unchanged, its options and their record."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ipca._dtensor import full
from ipca._hashing import tensor_sha256
from ipca.svd.decompose import window_svd
from ipca.svd.matrix_batch import frobenius_norm
from ipca.svd.parallel import thread_map
from ipca.svd.result import SVDReport, WindowSVD
from ipca.window import Window, check_factors

T = TypeVar("T")
FORMS = ("intact", "residual")
_ENTRIES = 2**17
"""Of a block of rows on a CPU: a megabyte in float64, which the cache of its core holds through all steps."""
_NULL = 1e-8
"""Singular values up to this share of ``‖W‖_F`` are 0 up to the rounding of their decomposition."""

Term = tuple[float, Tensor, Tensor]
"""``(c, B (…, out, r), A (…, r, in))``."""
Rows = slice | tuple[int, slice]
"""An index of a block: rows of a matrix, or of one matrix of a stack."""


def one_of(name: str, value: T | None, alias: str, other: T | None) -> T | None:
    """The value of an argument with two names, ours and PEFT's; None where neither is given.

    Raises:
        TypeError: both are given and differ.
    """
    if value is not None and other is not None and value != other:
        raise TypeError(f"{name}={value!r} and {alias}={other!r} are two names of one argument; pass one of them.")
    return other if value is None else value


def check_options(
    *, form: str, dropout: float, alpha: float, train: str = "both", magnitude: float | str = "sigma"
) -> None:
    """Raise TypeError or ValueError for a value out of range."""
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}; got {form!r}.")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}.")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be positive, got {alpha}.")
    check_factors(train, magnitude)


def default_adapter_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """The factors' dtype beside a weight of ``weight_dtype``: the same, but float32 for 16-bit weights."""
    return torch.promote_types(weight_dtype, torch.float32)


@dataclass(frozen=True)
class InitCertificate:
    """The distance of a layer's effective weight from the pretrained one before training.

    Attributes:
        dtype: of the weight, such as ``"bfloat16"``.
        max_abs: ``max|W_eff − W|``.
        relative: ``‖W_eff − W‖_F / ‖W‖_F``.
        bound: the largest ``relative`` that rounding ``W_res`` once to ``dtype`` can explain; 0 for ``intact``.
    """

    dtype: str
    max_abs: float
    relative: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.relative <= self.bound


@dataclass(frozen=True)
class InitialFactors:
    """``A0 (…, rank, in)`` and ``B0 (…, out, rank)`` of a layer, with the window and the weight they are taken from.

    Attributes:
        A0, B0: the factors that a layer starts from and keeps.
        window: resolved to indices.
        base_sha256: the hash of the weight.
        svd: the report of the decomposition; None where the factors were read from a file without one.
        certificate: how far the layer is from the weight before training.
    """

    A0: Tensor
    B0: Tensor
    window: Window
    base_sha256: str
    svd: SVDReport | None
    certificate: InitCertificate

    def factors(self) -> dict[str, Tensor]:
        """The four factors of a new layer by name: copies that train, and ``A0`` and ``B0`` themselves."""
        return {"lora_A": self.A0.clone(), "lora_B": self.B0.clone(), "lora_A0": self.A0, "lora_B0": self.B0}

    @property
    def null(self) -> tuple[int, int]:
        """How many of the window's components are 0, and how many there are; of all matrices of a stack."""
        return count_null(self.B0)


def count_null(B0: Tensor) -> tuple[int, int]:
    """How many columns of ``B0 (…, out, rank)`` are 0, the components that start as those of LoRA, and of how many."""
    zero = (full(B0) == 0).all(dim=-2)
    return int(zero.sum()), zero.numel()


def warn_null(null: Mapping[str, tuple[int, int]], train: str) -> None:
    """Warn in one line of layers with components that are 0; ``null`` is :func:`count_null` by the layer's path."""
    text = describe_null(null)
    if text:
        then = "train; exclude a layer to leave it as it is"
        if train == "A":
            then = "never train, as train='A' freezes B: set train to 'B' or 'both', or choose an earlier window"
        warnings.warn(f"{text}. These start as those of plain LoRA do, with B = 0, and {then}.", stacklevel=3)


def describe_null(null: Mapping[str, tuple[int, int]], shown: int = 3) -> str:
    """The layers with components that are 0, for a message; empty where there is none."""
    found = [f"{zeros} of {count} of {name}" for name, (zeros, count) in null.items() if zeros]
    more = f" and {len(found) - shown} more" if len(found) > shown else ""
    return f"components that are 0 in the window: {', '.join(found[:shown])}{more}" if found else ""


def initial_factors(
    weight: Tensor,
    window: Window,
    *,
    scaling: float,
    form: str,
    adapter_dtype: torch.dtype,
    tol: float | str,
    magnitude: float | str = "sigma",
    digest: str | None = None,
) -> InitialFactors:
    """The initial factors of a layer on ``weight (…, out, in)``, decomposed here; ``digest`` is the base's, if known.

    Raises:
        TypeError, ValueError: as :func:`ipca.window_svd`, or as :func:`factors_from_svd`.
        RuntimeError: as :func:`factors_from_svd`.
    """
    found = window_svd(weight, window, tol=tol, dtype=weight.dtype if weight.device.type == "mps" else torch.float64)
    return factors_from_svd(
        weight, found, scaling=scaling, form=form, adapter_dtype=adapter_dtype, magnitude=magnitude, digest=digest
    )


def factors_from_svd(
    weight: Tensor,
    found: WindowSVD,
    *,
    scaling: float,
    form: str,
    adapter_dtype: torch.dtype,
    magnitude: float | str = "sigma",
    digest: str | None = None,
) -> InitialFactors:
    """Split the window ``found`` of ``weight (…, out, in)``, a matrix or a stack, between the factors.

    ``B0 = U √(S / scaling)`` and ``A0 = √(S / scaling) Vh``, rounded to the dtype of ``weight`` and held in
    ``adapter_dtype``, so that a cast to the compute dtype changes nothing before training. Components whose singular
    value is 0 would have zero gradients forever: they start as those of LoRA, with a random row of ``A0`` (uniform in
    ``±1 / √in``; in a window of the inputs the direction itself, of that length) and 0 in ``B0``.

    Args:
        found: of this matrix or this stack, in float64 where the device has it.
        magnitude: ``"sigma"``, or a number ``m``: the factors of the other components have
            ``m ‖W‖_F / √d`` in place of ``S``, ``d = min(out, in)``.
        digest: ``tensor_sha256(weight)``, where it is known already.

    Raises:
        ValueError: the factors underflow to zeros, or a stack's windows do not all start at one index.
        RuntimeError: the factors overflow their dtype, or the initialization certificate does not hold.
    """
    report = _one_report(found)
    live = ~_null(weight, found.S)
    root = ((found.S if magnitude == "sigma" else _uniform(weight, found.S, float(magnitude))) / scaling).sqrt()
    A0, B0 = root[..., :, None] * found.Vh, found.U * root[..., None, :]
    if not live.all():
        rows = found.Vh / 3**0.5 if report.window.basis == "inputs" else _random_rows(A0, weight)
        A0 = torch.where(live[..., :, None], A0, rows)
        B0 = torch.where(live[..., None, :], B0, 0.0)
    A0, B0 = (factor.to(weight.dtype).to(adapter_dtype) for factor in (A0, B0))
    sized = magnitude != "sigma"
    if live.any() and not (A0[live].any() and B0.mT[live].any()):
        change = "lower alpha, or raise magnitude" if sized else "lower alpha"
        raise ValueError(f"the factors are all 0 in {weight.dtype} and could never train; {change}.")
    if not (torch.isfinite(A0).all() and torch.isfinite(B0).all()):
        change = "lower magnitude" if sized else "raise alpha"
        raise RuntimeError(
            f"the factors overflow {weight.dtype} or {adapter_dtype}; {change}, or keep them in a wider dtype."
        )
    certificate = certify_init(weight, A0, B0, scaling=scaling, form=form)
    return InitialFactors(A0, B0, report.window, digest or tensor_sha256(weight), report, certificate)


def _null(weight: Tensor, S: Tensor) -> Tensor:
    """Which of the singular values ``S (…, r)`` of ``weight (…, out, in)`` are 0."""
    return max(_NULL, 4 * torch.finfo(S.dtype).eps) * frobenius_norm(weight).to(S)[..., None] >= S


def _uniform(weight: Tensor, S: Tensor, magnitude: float) -> Tensor:
    """``magnitude ‖W‖_F / √d`` in place of each of the singular values ``S (…, r)``."""
    return (magnitude / math.sqrt(min(weight.shape[-2:])) * frobenius_norm(weight).to(S)[..., None]).expand_as(S)


def _random_rows(like: Tensor, weight: Tensor) -> Tensor:
    """Rows for ``A0 (…, r, in)`` as LoRA draws them, the same for every tensor of this shape on every device.

    They are 0 where a ``weight (…, out, in)`` that is not all 0 has a column of zeros: an embedding's padding stays 0.
    """
    rows = torch.empty(like.shape, dtype=torch.float64, device="cpu")
    rows.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    used = weight.any(dim=-2, keepdim=True)
    return (rows / like.shape[-1] ** 0.5).to(like) * (used | ~used.any(dim=-1, keepdim=True))


def _one_report(found: WindowSVD) -> SVDReport:
    """The report of the matrix; for a stack that of its worst one, with the time and work of all."""
    starts = sorted({report.window.index for report in found.reports})
    if len(starts) > 1:
        raise ValueError(
            f"the windows of this stack of {len(found.reports)} weights start at {starts[0]} to {starts[-1]}, "
            "but a stack has one window; name an index or a fraction instead of looking at each spectrum."
        )
    seconds, flops = (sum(getattr(report, name) for report in found.reports) for name in ("seconds", "flops"))
    return replace(found.report, seconds=seconds, flops=flops)


def frozen_weight(weight: Tensor, A0: Tensor, B0: Tensor, *, scaling: float, form: str) -> Tensor:
    """The frozen weight: ``W`` itself (intact), or ``W_res = W − scaling · B0 A0``, rounded once (residual)."""
    return weight if form == "intact" else add_low_rank(weight, [(-scaling, B0, A0)])


def certify_init(weight: Tensor, A0: Tensor, B0: Tensor, *, scaling: float, form: str) -> InitCertificate:
    """Measure ``‖W_eff(0) − W‖`` of a layer that starts from ``A0, B0``, and raise if it is above the dtype's bound."""
    if form == "intact":
        return InitCertificate(str(weight.dtype).removeprefix("torch."), 0.0, 0.0, 0.0)
    base = frozen_weight(weight, A0, B0, scaling=scaling, form=form)
    certificate = measure_init(weight, base, A0, B0, scaling=scaling)
    if not certificate.holds:
        norm, window = _norm(weight), scaling * _norm_of_product(B0, A0)
        if 2 * norm < window < math.inf:  # by its magnitude: no window of a weight is larger than the weight
            raise RuntimeError(
                f"the window is {window / norm:.3g} times as large as the weight, and rounding W_res moves the start "
                f"by {certificate.relative:.1e} (relative); lower magnitude, or use the intact form, which rounds "
                "nothing."
            )
        raise RuntimeError(
            f"the effective weight is off by {certificate.relative:.1e} (relative) before training, "
            f"but one rounding to {certificate.dtype} explains at most {certificate.bound:.1e}; "
            "please report this weight."
        )
    return certificate


def measure_init(weight: Tensor, base: Tensor, A0: Tensor, B0: Tensor, *, scaling: float) -> InitCertificate:
    """``‖base + scaling · B0 A0 − weight‖``, and the bound that one rounding of ``base`` explains.

    The sums are float64, whose own rounding only matters beside a float64 weight: ``base`` and the sum here are off by
    at most ``(rank + 2) eps scaling |B0| |A0|`` each, in every entry.
    """

    def norms(rows: Rows, effective: Tensor) -> tuple[float, float, float]:
        pretrained = weight[rows].to(effective.dtype)
        difference = effective.sub_(pretrained)
        return pretrained.norm().item(), difference.norm().item(), difference.abs_().max().item()

    found = _each_block(norms, base, [(scaling, B0, A0)])
    norm, error = (math.hypot(*parts) for parts in ([block[0] for block in found], [block[1] for block in found]))
    largest = max((block[2] for block in found), default=0.0)
    info = torch.finfo(weight.dtype)
    subnormal = math.sqrt(weight.numel()) * info.smallest_normal * info.eps
    sums = 2 * (A0.shape[-2] + 2) * torch.finfo(torch.float64).eps * scaling * _norm(B0) * _norm(A0)
    sums = sums if math.isfinite(sums) else 0.0  # factors that are not finite explain nothing
    bound = info.eps + (subnormal + sums) / norm if norm > 0 else 0.0
    dtype = str(weight.dtype).removeprefix("torch.")
    return InitCertificate(dtype, largest, error / norm if norm > 0 else error, bound)


def _norm(factor: Tensor) -> float:
    return factor.to(torch.promote_types(factor.dtype, torch.float32)).norm().item()


def _norm_of_product(B: Tensor, A: Tensor) -> float:
    """``‖B A‖_F``, of a stack that of all its matrices, without the product."""
    B, A = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in (B, A))
    return math.sqrt(max(float(((B.mT @ B) * (A @ A.mT)).sum()), 0.0))


def add_low_rank(weight: Tensor, terms: Sequence[Term], dtype: torch.dtype | None = None) -> Tensor:
    """``weight (…, out, in) + Σ c · B A`` as a new tensor of ``dtype``, by default that of ``weight``.

    Sharded tensors are gathered: a collective, whose full result every process gets.
    """
    weight, terms = full(weight), [(c, full(B), full(A)) for c, B, A in terms]
    out = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)
    _each_block(lambda rows, block: out[rows].copy_(block), weight, terms)
    return out


def _each_block(use: Callable[[Rows, Tensor], T], weight: Tensor, terms: Sequence[Term]) -> list[T]:
    """``use(rows, block)`` for all blocks of rows of ``weight (…, out, in) + Σ c · B A``, in order of the rows.

    A block is float64 (float32 where the device has none). On a CPU each thread has a share of them.
    """
    *stack, out, inner = weight.shape
    on_cpu = weight.device.type == "cpu"
    step = max(1, (_ENTRIES if on_cpu else 32 * _ENTRIES) // max(1, inner))
    slices = [slice(start, start + step) for start in range(0, out, step)]
    places: list[Rows] = [(i, rows) for i in range(stack[0]) for rows in slices] if stack else [*slices]
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    A_wide = [A.to(wide) for _, _, A in terms]

    @torch.no_grad()
    def run(share: Sequence[Rows]) -> list[T]:
        return [use(rows, block_of(rows)) for rows in share]

    def block_of(rows: Rows) -> Tensor:
        block = weight[rows].to(wide, copy=True)
        for (c, B, _), A in zip(terms, A_wide, strict=True):
            block.addmm_(B[rows].to(wide), A[rows[0]] if isinstance(rows, tuple) else A, alpha=c)
        return block

    size = max(1, math.ceil(len(places) / (torch.get_num_threads() if on_cpu else 1)))
    shares = [places[start : start + size] for start in range(0, len(places), size)]
    return [result for results in thread_map(run, shares, [8 * _ENTRIES] * len(shares)) for result in results]


class LayerRecord(NamedTuple):
    """A layer's settings and its window's first index, None before the window is set: its ``_extra_state``, as JSON.

    Fields at their default are left out; checkpoints without them are read.
    """

    rank: int
    alpha: float
    form: str
    start: int | None
    base_sha256: str | None
    basis: str = "weight"
    magnitude: float | str = "sigma"
    train: str = "both"


def encode_extra_state(record: LayerRecord) -> Tensor:
    """The record as a 1-D uint8 tensor, which every checkpoint format can hold."""
    defaults = LayerRecord._field_defaults
    values = {k: v for k, v in record._asdict().items() if k not in defaults or v != defaults[k]}
    return torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)


def decode_extra_state(state: Tensor) -> LayerRecord:
    """The inverse of :func:`encode_extra_state`.

    Raises:
        ValueError: the bytes are no such record.
    """
    try:
        values = json.loads(bytes(state.cpu().tolist()))
        missing = set(LayerRecord._fields) - values.keys() - LayerRecord._field_defaults.keys()
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the layer's record is damaged: {error}.") from None
    if missing:
        raise ValueError(f"the layer's record lacks {', '.join(sorted(missing))}.")
    return LayerRecord(**{name: values[name] for name in LayerRecord._fields if name in values})


def check_extra_state(record: LayerRecord, state: Tensor) -> None:
    """Raise ValueError where the saved ``state`` has another rank, alpha, form or frozen factor than ``record``."""
    saved = decode_extra_state(state)
    for name in ("rank", "alpha", "form", "train"):
        if getattr(saved, name) != getattr(record, name):
            raise ValueError(
                f"the state dict was saved with {name}={getattr(saved, name)!r}, "
                f"this layer has {getattr(record, name)!r}."
            )
