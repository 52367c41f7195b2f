"""LinearPC: a linear layer that trains one window of its pretrained weight's singular components."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipca.nn.layer_kinds import LINEAR, build_layer, layer_kind, read_layer
from ipca.nn.product import ProductLayer
from ipca.ops import Layer, pc_linear
from ipca.window import Window, as_window


class LinearPC(ProductLayer):
    """A linear layer of which a window of the pretrained weight's singular components trains.

    For a pretrained ``W = U S Vh``, shape ``(out, in)``, and a window ``w = [start, start + rank)``::

        A0 = √(S_w / scaling) Vh_w,   B0 = U_w √(S_w / scaling),   scaling = alpha / rank

        form="residual"   K = W − scaling · B0 A0    y = x Kᵀ + bias + scaling · z Aᵀ Bᵀ
        form="intact"     K = W                      y = x Kᵀ + bias + scaling · (z Aᵀ Bᵀ − z A0ᵀ B0ᵀ)

    with ``K = base_weight`` and ``z = dropout(x)``. ``A`` and ``B`` start at ``A0`` and ``B0`` and are trained; all
    else is frozen. Before training the layer computes ``x Wᵀ + bias``: in the residual form up to the rounding of
    ``W_res`` and of the two products, unless dropout thins out the window's part in training mode; in the intact form
    to the bit with the backend ``reference``, by default that of a CPU, dropout or not, and with ``merged`` on
    contiguous ``x``. Other backends may round ``x Wᵀ`` differently there.

    Used like ``nn.Linear`` in a model's own code: a new layer draws a random weight as ``nn.Linear`` does and takes its
    window; the state dict of a plain ``nn.Linear`` loads into it and sets the window anew, from that weight; its own
    state dict restores it without an SVD. Built on the meta device it waits for either.

    ``weight`` is not a parameter here but the effective weight, computed on every access, so that code which reads a
    layer's weight without calling it stays right.

    Shapes: ``x (…, in)``, ``y (…, out)``, ``base_weight, weight (out, in)``, ``bias (out,)``,
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
        weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
        super().__init__(
            weight,
            weight.new_empty(out_features) if bias else None,
            (out_features, in_features),
            as_window(window, rank),
            alpha=alpha,
            form=form,
            dropout=dropout,
            adapter_dtype=adapter_dtype,
            tol=tol,
        )
        if not weight.is_meta:
            self.reset_parameters()

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)

    def window_product(self, x: Tensor, A: Tensor, B: Tensor, dropout: float) -> Tensor:
        """All of it by one registered op, which chooses the kernels."""
        frozen = {"A0": self.lora_A0, "B0": self.lora_B0} if self.form == "intact" else {}
        return pc_linear(x, self.base_weight, A, B, self.bias, scaling=self.scaling, dropout=dropout, **frozen)

    def tensors(self) -> Layer:
        """What :func:`ipca.ops.pc_linear_shared` takes of a layer."""
        A0, B0 = (self.lora_A0, self.lora_B0) if self.form == "intact" else (None, None)
        return Layer(self.base_weight, self.lora_A, self.lora_B, self.bias, A0, B0, self.scaling)

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
        return cls.from_layer(linear, as_window(window, rank), **options)

    @classmethod
    def _meta_like(cls, plain: nn.Module, window: Window, **options: Any) -> LinearPC:
        kind = layer_kind(plain)
        if kind not in LINEAR:
            raise TypeError(f"expected an nn.Linear or a transformers Conv1D, got {type(plain).__name__}.")
        weight, bias = read_layer(plain)
        out_features, in_features = weight.shape
        options["device"] = "meta"
        layer = cls(in_features, out_features, window=window, bias=bias is not None, dtype=weight.dtype, **options)
        layer.kind = kind
        return layer

    def reset_parameters(self) -> None:
        """Draw ``weight`` and ``bias`` as ``nn.Linear`` does, and take the window of that weight."""
        self.unmerge()
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.base_weight, a=math.sqrt(5))
            if self.bias is not None:
                bound = 1 / math.sqrt(self.in_features)
                nn.init.uniform_(self.bias, -bound, bound)
            start = self._initial_factors(self.base_weight.detach())
            self.base_weight.copy_(self._base_for(self.base_weight, start))
            for name, value in start.factors().items():
                getattr(self, name).copy_(value)
        self._record_init(start)

    def to_plain(self, *, base: bool = False) -> nn.Module:
        weight = self.pretrained_weight() if base else self.effective_weight()
        return build_layer(self.kind, weight, None if self.bias is None else self.bias.detach().clone())

    to_linear = to_plain
