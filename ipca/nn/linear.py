"""LinearPC: a linear layer that trains one window of its pretrained weight's singular components."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipca.nn.kinds import build_layer, layer_kind, read_layer
from ipca.nn.lowrank import add_low_rank
from ipca.nn.record import check_record, decode_record, encode_record
from ipca.nn.start import (
    InitCertificate,
    WindowStart,
    check_options,
    default_adapter_dtype,
    kept_weight,
    window_start,
)
from ipca.ops import Layer, pc_linear
from ipca.svd import SVDReport
from ipca.window import Window, as_window


class LinearPC(nn.Module):
    """A linear layer of which a window of the pretrained weight's singular components trains.

    For a pretrained ``W = U S Vh``, shape ``(out, in)``, and a window ``w = [start, start + rank)``::

        A0 = √(S_w / scaling) Vh_w,   B0 = U_w √(S_w / scaling),   scaling = alpha / rank

        form="residual"   K = W − scaling · B0 A0    y = x Kᵀ + bias + scaling · z Aᵀ Bᵀ
        form="intact"     K = W                      y = x Kᵀ + bias + scaling · (z Aᵀ Bᵀ − z A0ᵀ B0ᵀ)

    with ``K = kept_weight`` and ``z = dropout(x)``. ``A`` and ``B`` start at ``A0`` and ``B0`` and are trained; all
    else is frozen. Before training the layer computes ``x Wᵀ + bias``: in the residual form up to the rounding of
    ``W_res`` and of the two products, unless dropout thins out the window's part in training mode; in the intact form
    to the bit with the backend ``reference``, by default that of a CPU, dropout or not, and with ``merged`` on
    contiguous ``x``. Other backends may round ``x Wᵀ`` differently there.

    Used like ``nn.Linear`` in a model's own code: a new layer draws a random weight as ``nn.Linear`` does and takes its
    window; the state dict of a plain ``nn.Linear`` loads into it and sets the window anew, from that weight; its own
    state dict restores it without an SVD. Built on the meta device it waits for either.

    ``weight`` is not a parameter here but the effective weight, computed on every access, so that code which reads a
    layer's weight without calling it stays right.

    Shapes: ``x (…, in)``, ``y (…, out)``, ``kept_weight, weight (out, in)``, ``bias (out,)``,
    ``lora_A, lora_A0 (rank, in)``, ``lora_B, lora_B0 (out, rank)``.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``.
        rank: number of components; 16 by default.
        window: a :class:`~ipca.Window` or its start, such as ``"middle"``, ``0.33`` or ``"start=256"``.
        alpha: ``scaling · rank``; default ``rank``, so that scaling is 1, as in the paper.
        form: ``"residual"`` (one low-rank product) or ``"intact"`` (two; the base weight stays untouched).
        dropout: probability of dropping an entry of the low-rank branch's input while training.
        adapter_dtype: of the factors; default the weight's, but float32 for 16-bit weights.
        tol: of the decomposition, see :func:`ipca.window_svd`.

    Raises:
        ValueError: an argument out of range, a window that does not fit ``min(in_features, out_features)``, or NaN or
            Inf in the weight.

    Source: "Least but not Last", arXiv 2602.03493; PiSSA, arXiv 2404.02948; LoRA, arXiv 2106.09685.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | None = None,
        window: Window | str | float = "middle",
        bias: bool = True,
        *,
        alpha: float | None = None,
        form: str = "residual",
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
        tol: float | str = "default",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.requested_window = as_window(window, rank)
        self.in_features, self.out_features = in_features, out_features
        self.rank = self.requested_window.rank
        self.alpha = float(self.rank if alpha is None else alpha)
        self.form, self.dropout, self.tol = form, float(dropout), tol
        self.kind = "linear"
        check_options(form=form, dropout=self.dropout, alpha=self.alpha)
        if self.rank > min(in_features, out_features):
            raise ValueError(
                f"rank {self.rank} is above the {min(in_features, out_features)} singular values of a "
                f"({out_features}, {in_features}) weight; lower `rank`."
            )

        self.window: Window | None = None
        self.base_sha256: str | None = None
        self.svd_report: SVDReport | None = None
        self.certificate: InitCertificate | None = None
        self._disabled = False
        self._merged: Tensor | None = None

        weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
        factor = weight.new_empty(0, dtype=adapter_dtype or default_adapter_dtype(weight.dtype))
        self.kept_weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(weight.new_empty(out_features), requires_grad=False) if bias else None
        self.lora_A = nn.Parameter(factor.new_empty(self.rank, in_features))
        self.lora_B = nn.Parameter(factor.new_empty(out_features, self.rank))
        self.register_buffer("lora_A0", torch.empty_like(self.lora_A, requires_grad=False))
        self.register_buffer("lora_B0", torch.empty_like(self.lora_B, requires_grad=False))
        self.lora_A0: Tensor
        self.lora_B0: Tensor
        if not weight.is_meta:
            self.reset_parameters()

    @property
    def scaling(self) -> float:
        """``alpha / rank``."""
        return self.alpha / self.rank

    @property
    def merged(self) -> bool:
        return self._merged is not None

    @property
    def is_disabled(self) -> bool:
        """Whether the layer computes the pretrained function, inside :meth:`disabled`."""
        return self._disabled

    @property
    def is_plain(self) -> bool:
        """Whether ``forward`` is one product with a weight at the moment: merged, or intact and disabled."""
        return self.form == "intact" if self._disabled else self.merged

    @property
    def weight(self) -> Tensor:
        """``W_eff (out, in)``, computed anew, for code that reads a layer's weight instead of calling the layer.

        It is what ``forward`` multiplies by at the moment (disabled, merged or neither); gradients reach the factors.
        """
        if self._merged is not None and not self._disabled:
            return self._merged
        if self._disabled and self.form == "intact":
            return self.kept_weight
        B, A = (self.lora_B0, self.lora_A0) if self._disabled else (self.lora_B, self.lora_A)
        low = self._product(B, A)
        if self.form == "intact":
            low = low - self._product(self.lora_B0, self.lora_A0)
        return self.kept_weight + self.scaling * low

    def forward(self, x: Tensor) -> Tensor:
        if self.window is None:
            raise RuntimeError("This LinearPC has no window yet: load a state dict with load_state_dict().")
        if self._merged is not None and not self._disabled:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("A merged LinearPC cannot train: call unmerge() first, or eval().")
            return F.linear(x, self._merged, self.bias)
        A, B, A0, B0 = self.lora_A, self.lora_B, self.lora_A0, self.lora_B0
        if self._disabled:
            if self.form == "intact":
                return F.linear(x, self.kept_weight, self.bias)
            return pc_linear(x, self.kept_weight, A0, B0, self.bias, scaling=self.scaling)
        frozen = {"A0": A0, "B0": B0} if self.form == "intact" else {}
        dropout = self.dropout if self.training else 0.0
        return pc_linear(x, self.kept_weight, A, B, self.bias, scaling=self.scaling, dropout=dropout, **frozen)

    def tensors(self) -> Layer:
        """What :func:`ipca.ops.pc_linear_shared` takes of a layer."""
        A0, B0 = (self.lora_A0, self.lora_B0) if self.form == "intact" else (None, None)
        return Layer(self.kept_weight, self.lora_A, self.lora_B, self.bias, A0, B0, self.scaling)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, window: Window | str | float = "middle", *, rank: int | None = None, **options: Any
    ) -> LinearPC:
        """A LinearPC that computes what ``linear`` computes, which stays as it is.

        Args:
            linear: an ``nn.Linear`` or a transformers ``Conv1D``. The intact form shares the memory of an
                ``nn.Linear``'s weight, both forms share the bias's.
            window, rank: as for the class.
            options: ``alpha``, ``form``, ``dropout``, ``adapter_dtype``, ``tol``, as for the class.

        Raises:
            TypeError: ``linear`` is another type, or its weight has no supported dtype.
            ValueError: as for the class.
        """
        layer = cls._like(linear, as_window(window, rank), **options)
        layer._begin(linear, layer.start_for(read_layer(linear)[0]))
        return layer

    @classmethod
    def from_start(cls, linear: nn.Module, start: WindowStart, **options: Any) -> LinearPC:
        """As :meth:`from_linear`, with the factors already at hand: no SVD."""
        layer = cls._like(linear, start.window, adapter_dtype=start.A0.dtype, **options)
        layer._begin(linear, start)
        return layer

    def reset_parameters(self) -> None:
        """Draw ``weight`` and ``bias`` as ``nn.Linear`` does, and take the window of that weight."""
        self.unmerge()
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.kept_weight, a=math.sqrt(5))
            if self.bias is not None:
                bound = 1 / math.sqrt(self.in_features)
                nn.init.uniform_(self.bias, -bound, bound)
            start = self.start_for(self.kept_weight.detach())
            self.kept_weight.copy_(self._kept_of(self.kept_weight, start))
            for factor, value in self._factors(start).items():
                getattr(self, factor).copy_(value)
        self._remember(start)

    def start_for(self, weight: Tensor) -> WindowStart:
        """The factors this layer would start from on the pretrained ``weight (out, in)``; changes nothing."""
        return window_start(
            weight,
            self.requested_window,
            scaling=self.scaling,
            form=self.form,
            adapter_dtype=self.lora_A.dtype,
            tol=self.tol,
        )

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """``W_eff (out, in)`` of the trained layer, added up in float64, in the weight's dtype, as a new tensor."""
        trained, frozen = (1, self.lora_B, self.lora_A), (-1, self.lora_B0, self.lora_A0)
        return self._plus(trained) if self.form == "residual" else self._plus(trained, frozen)

    @torch.no_grad()
    def base_weight(self) -> Tensor:
        """The pretrained ``W (out, in)``, in the weight's dtype, as a new tensor (residual form: up to rounding)."""
        return self._plus((1, self.lora_B0, self.lora_A0)) if self.form == "residual" else self._plus()

    @torch.no_grad()
    def residual_weight(self) -> Tensor:
        """``W_res = W − scaling · B0 A0 (out, in)``, in the weight's dtype, as a new tensor."""
        return self._plus() if self.form == "residual" else self._plus((-1, self.lora_B0, self.lora_A0))

    def merge(self) -> None:
        """Compute ``W_eff`` once and multiply by it alone. What is kept stays beside it, for :meth:`unmerge`."""
        if not self.merged:
            self._merged = self.effective_weight()

    def unmerge(self) -> None:
        """Undo :meth:`merge`, to the bit."""
        self._merged = None

    def to_linear(self, *, base: bool = False) -> nn.Module:
        """A plain layer of the original type with the effective weight; shares no memory with this one.

        Args:
            base: with the pretrained weight instead.
        """
        weight = self.base_weight() if base else self.effective_weight()
        return build_layer(self.kind, weight, None if self.bias is None else self.bias.detach().clone())

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the layer computes the pretrained function (residual form: up to rounding)."""
        before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = before

    def extra_repr(self) -> str:
        where = repr(self.requested_window.text)
        if self.window is not None:
            where = f"[{self.window.index}, {self.window.index + self.rank})"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"window={where}, rank={self.rank}, alpha={self.alpha:g}, form={self.form}"
            + (f", dropout={self.dropout:g}" if self.dropout else "")
            + (", merged" if self.merged else "")
            + (", disabled" if self._disabled else "")
        )

    # State: tensors as usual, and one JSON record that a state dict carries as bytes.

    def get_extra_state(self) -> Tensor:
        return encode_record(self)

    def set_extra_state(self, state: Tensor) -> None:
        record = decode_record(state)
        self.window = None if record["start"] is None else Window(record["start"], self.rank)
        self.base_sha256 = record["base_sha256"]
        self.svd_report = self.certificate = None

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        start = None
        try:
            if prefix + "weight" in state_dict and prefix + "kept_weight" not in state_dict:
                assign = local_metadata.get("assign_to_params_buffers", False)
                state_dict, start = self._from_plain(state_dict, prefix, assign)
            else:
                check_record(self, state_dict, prefix)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix.rstrip('.') or 'LinearPC'}: {error}")
            return
        self.unmerge()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if start is not None and not self.kept_weight.is_meta:
            self._remember(start)

    def _from_plain(self, state_dict: dict[str, Any], prefix: str, assign: bool) -> tuple[dict[str, Any], WindowStart]:
        """The state dict that this layer would have had on the plain layer's ``weight``."""
        weight = state_dict[prefix + "weight"]
        weight = weight.mT if self.kind == "conv1d" else weight
        kept = self.kept_weight
        if weight.shape != kept.shape:
            raise ValueError(f"the weight has shape {tuple(weight.shape)}, this layer {tuple(kept.shape)}.")
        if not assign:
            weight = weight.to(dtype=kept.dtype, device=weight.device if kept.is_meta else kept.device)
        start = self.start_for(weight)
        own = {prefix + name: value for name, value in self._factors(start).items()}
        own[prefix + "kept_weight"] = self._kept_of(weight, start)
        own[prefix + "_extra_state"] = self.get_extra_state()
        return {**{key: value for key, value in state_dict.items() if key != prefix + "weight"}, **own}, start

    def _apply(self, fn: Any, recurse: bool = True) -> LinearPC:
        """Move or cast. Casting the residual form rounds its parts anew, so that they still add up to ``W``."""
        merged = self.merged
        self.unmerge()
        kept, A0, B0 = self.kept_weight.detach(), self.lora_A0, self.lora_B0
        super()._apply(fn, recurse)
        new = self.kept_weight
        cast = self.lora_A0.dtype != A0.dtype or new.dtype != kept.dtype
        if self.form == "residual" and cast and not (kept.is_meta or new.is_meta):
            change = [(self.scaling, B0, A0), (-self.scaling, self.lora_B0.to(B0.device), self.lora_A0.to(A0.device))]
            with torch.no_grad():
                new.copy_(add_low_rank(kept, change, dtype=new.dtype))
        if merged:
            self.merge()
        return self

    def _product(self, B: Tensor, A: Tensor) -> Tensor:
        return B.to(self.kept_weight.dtype) @ A.to(self.kept_weight.dtype)

    def _plus(self, *terms: tuple[int, Tensor, Tensor]) -> Tensor:
        """``kept_weight + Σ sign · scaling · B A`` in float64, rounded once."""
        return add_low_rank(self.kept_weight, [(sign * self.scaling, B, A) for sign, B, A in terms])

    def _kept_of(self, weight: Tensor, start: WindowStart) -> Tensor:
        return kept_weight(weight, start.A0, start.B0, scaling=self.scaling, form=self.form).contiguous()

    @classmethod
    def _like(cls, linear: nn.Module, window: Window, **options: Any) -> LinearPC:
        """An empty layer on the meta device with the shape, dtype and type of ``linear``."""
        kind = layer_kind(linear)
        if kind is None:
            raise TypeError(f"expected an nn.Linear or a transformers Conv1D, got {type(linear).__name__}.")
        weight, bias = read_layer(linear)
        out_features, in_features = weight.shape
        options["device"] = "meta"
        layer = cls(in_features, out_features, window=window, bias=bias is not None, dtype=weight.dtype, **options)
        layer.kind = kind
        return layer.train(linear.training)

    def _begin(self, linear: nn.Module, start: WindowStart) -> None:
        weight, bias = read_layer(linear)
        self.kept_weight = nn.Parameter(self._kept_of(weight, start), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        factors = self._factors(start)
        self.lora_A, self.lora_B = nn.Parameter(factors["lora_A"]), nn.Parameter(factors["lora_B"])
        self.lora_A0, self.lora_B0 = factors["lora_A0"], factors["lora_B0"]
        self._remember(start)

    def _factors(self, start: WindowStart) -> dict[str, Tensor]:
        return {
            "lora_A": start.A0.clone(),
            "lora_B": start.B0.clone(),
            "lora_A0": start.A0,
            "lora_B0": start.B0,
        }

    def _remember(self, start: WindowStart) -> None:
        self.window, self.base_sha256 = start.window, start.base_sha256
        self.svd_report, self.certificate = start.svd, start.certificate
