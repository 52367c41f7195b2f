"""LinearPC: a linear layer that trains one window of its pretrained weight's singular components."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipca.nn.initialization import one_of
from ipca.nn.layer_kinds import LINEAR, build_layer, layer_kind, read_layer
from ipca.nn.subclasses import restore, subclass_of
from ipca.nn.window_layer import LayerOptions, ProductLayer
from ipca.ops.linear import pc_linear_of_layer
from ipca.ops.op import Layer
from ipca.window import Window, as_window

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LinearPC(ProductLayer):
    """A linear layer that trains a window of principal components (PC) of its pretrained weight.

    The principal components of ``W = U S Vh``, shape ``(out, in)``, are its singular triplets, largest first. For a
    window ``w = [start, start + rank)`` of them::

        A0 = √(S_w / scaling) Vh_w,   B0 = U_w √(S_w / scaling),   scaling = alpha / rank

        form="intact"     W_base = W                      y = x W_baseᵀ + bias + scaling · (z Aᵀ Bᵀ − z A0ᵀ B0ᵀ)
        form="residual"   W_base = W − scaling · B0 A0    y = x W_baseᵀ + bias + scaling · z Aᵀ Bᵀ

    with ``W_base = base_weight`` and ``z = dropout(x)``. ``A`` and ``B`` start at ``A0`` and ``B0`` and are trained;
    all else is frozen. Before training the layer computes ``x Wᵀ + bias``: in the intact form to the bit with the
    backends ``reference``, the default of a CPU, dropout or not, and ``merged`` (others may round ``x Wᵀ`` otherwise);
    in the residual form up to the rounding of ``W_base`` and of the two products, unless dropout thins out the window's
    part in training mode.

    Used like ``nn.Linear`` in a model's own code: a new layer draws a random weight as ``nn.Linear`` does and takes its
    window; the state dict of a plain ``nn.Linear`` loads into it and sets the window anew, from that weight; its own
    state dict restores it without an SVD. Built on the meta device it waits for either.

    ``weight`` is not a parameter here but the effective weight, computed where a computation needs it and read-only,
    so that code which reads a layer's weight without calling it stays right.

    >>> plain, x = nn.Linear(64, 32), torch.ones(2, 64)
    >>> layer = ipca.nn.LinearPC.from_linear(plain, ipca.Window.middle(4))
    >>> layer
    LinearPC(in_features=64, out_features=32, bias=True, window=[14, 18), rank=4, alpha=4, form=intact)
    >>> torch.equal(layer(x), plain(x))
    True

    Shapes: ``x (…, in)``, ``y (…, out)``, ``base_weight, weight (out, in)``, ``bias (out,)``,
    ``lora_A, lora_A0 (rank, in)``, ``lora_B, lora_B0 (out, rank)``.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``.
        rank: number of components; 16 by default.
        window: a :class:`~ipca.Window` or its start, such as ``"middle"``, ``0.33`` or ``"start=256"``.
        alpha: ``scaling · rank``; default ``rank``, so that scaling is 1, as in the paper.
        form: ``"intact"`` (the base weight stays untouched) or ``"residual"`` (the paper's).
        dropout: probability of dropping an entry of the low-rank branch's input while training.
        adapter_dtype: of the factors; default the weight's, but float32 for 16-bit weights.
        tol: of the decomposition, see :func:`ipca.window_svd`.
        train: ``"both"`` factors, or only ``"A"``, or only ``"B"``: the other one is frozen at its start.
        magnitude: ``"sigma"``, or a number ``m``: all components start at one size, ``σ_i = m ‖W‖_F / √d`` in the
            factors, ``d = min(out, in)``. One rate then means the same for every window (:func:`ipca.param_groups`).
        r, lora_alpha, lora_dropout: PEFT's names of ``rank``, ``alpha`` and ``dropout``.

    Raises:
        TypeError: an argument is given by both of its names, and the values differ.
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
        form: str = "intact",
        dropout: float | None = None,
        adapter_dtype: torch.dtype | None = None,
        tol: float | str = "default",
        train: str = "both",
        magnitude: float | str = "sigma",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        r: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float | None = None,
    ) -> None:
        weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
        super().__init__(
            weight,
            weight.new_empty(out_features) if bias else None,
            (out_features, in_features),
            as_window(window, one_of("rank", rank, "r", r)),
            alpha=one_of("alpha", alpha, "lora_alpha", lora_alpha),
            form=form,
            dropout=one_of("dropout", dropout, "lora_dropout", lora_dropout) or 0.0,
            adapter_dtype=adapter_dtype,
            tol=tol,
            train=train,
            magnitude=magnitude,
        )
        if not weight.is_meta:
            self.reset_parameters()

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))

    def window_product(self, x: Tensor, A: Tensor, B: Tensor, dropout: float) -> Tensor:
        """The output by one registered op, which selects the kernels."""
        if x.is_nested:  # of no shape that the op could take; nn.TransformerEncoder makes such from a padding mask
            return super().window_product(x, A, B, dropout)
        held, scaling = self.held, self.alpha / self.rank
        A0, B0 = (held("lora_A0"), held("lora_B0")) if self.form == "intact" else (None, None)
        return pc_linear_of_layer(x, Layer(held("base_weight"), A, B, held("bias"), A0, B0, scaling), dropout)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        window: Window | str | float = "middle",
        *,
        rank: int | None = None,
        alpha: float | None = None,
        form: str = "intact",
        dropout: float | None = None,
        adapter_dtype: torch.dtype | None = None,
        tol: float | str = "default",
        train: str = "both",
        magnitude: float | str = "sigma",
        r: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float | None = None,
    ) -> LinearPC:
        """A LinearPC that computes what ``linear`` computes; ``linear`` is not changed.

        Args:
            linear: an ``nn.Linear``, a subclass that computes the same, or a transformers ``Conv1D``. The intact form
                shares the memory of an ``nn.Linear``'s weight, both forms share the bias's.
            window: a window or its start.
            rank, alpha, form, dropout, adapter_dtype, tol, train, magnitude: as for the class.
            r, lora_alpha, lora_dropout: likewise.

        Raises:
            TypeError: ``linear`` is another type, or its weight has no supported dtype; or as for the class.
            ValueError: as for the class.
        """
        return cls.from_layer(
            linear,
            as_window(window, one_of("rank", rank, "r", r)),
            alpha=one_of("alpha", alpha, "lora_alpha", lora_alpha),
            form=form,
            dropout=one_of("dropout", dropout, "lora_dropout", lora_dropout) or 0.0,
            adapter_dtype=adapter_dtype,
            tol=tol,
            train=train,
            magnitude=magnitude,
        )

    @classmethod
    def _meta_like(cls, plain: nn.Module, window: Window, **options: Unpack[LayerOptions]) -> LinearPC:
        kind = layer_kind(plain)
        if kind not in LINEAR:
            raise TypeError(f"expected an nn.Linear or a transformers Conv1D, got {type(plain).__name__}.")
        weight, bias = read_layer(plain, kind)
        out_features, in_features = weight.shape
        layer = cls(
            in_features,
            out_features,
            window=window,
            bias=bias is not None,
            device="meta",
            dtype=weight.dtype,
            **options,
        )
        layer.kind = kind
        if kind == "linear":
            layer.subclass = subclass_of(plain, nn.Linear)
        return layer

    def reset_parameters(self) -> None:
        """Draw ``weight`` and ``bias`` as ``nn.Linear`` does, and take the window of that weight."""
        self.unmerge()
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.base_weight, a=math.sqrt(5))
            if self.bias is not None:
                bound = 1 / math.sqrt(self.in_features)
                nn.init.uniform_(self.bias, -bound, bound)
            initial = self._initial_factors(self.base_weight.detach())
            self.base_weight.copy_(self._base_for(self.base_weight, initial))
            for name, value in initial.factors().items():
                getattr(self, name).copy_(value)
        self._record_init(initial)

    def to_plain(self, *, base: bool = False) -> nn.Module:
        weight = self.pretrained_weight() if base else self.effective_weight()
        plain = build_layer(self.kind, weight, None if self.bias is None else self.bias.detach().clone())
        return restore(plain, self.subclass)

    to_linear = to_plain
