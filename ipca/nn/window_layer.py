"""WindowLayer: the state of a layer that trains one window of its pretrained weight's singular components."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ipca._dtensor import part_like
from ipca.nn.extra_state import decode_extra_state, describe, encode_extra_state
from ipca.nn.initialization import (
    InitCertificate,
    InitialFactors,
    check_options,
    default_adapter_dtype,
    frozen_weight,
    initial_factors,
)
from ipca.nn.layer_kinds import read_layer
from ipca.nn.lowrank import add_low_rank
from ipca.nn.state import incoming_state, reround
from ipca.svd import SVDReport
from ipca.window import Window

Layer = TypeVar("Layer", bound="WindowLayer")


class WindowLayer(nn.Module):
    """A layer whose weight, read as a matrix ``W (out, in)``, trains a window ``w`` of its singular components.

    Here is what all such layers share: what is kept, the factors, the weights they make, merging, saving, casting.
    What a layer computes is its subclass's; :class:`ipca.nn.product.ProductLayer` does for a layer of one input.

    For ``W = U S Vh``::

        A0 = √(S_w / scaling) Vh_w,   B0 = U_w √(S_w / scaling),   scaling = alpha / rank

        form="residual"   K = W − scaling · B0 A0    W_eff = K + scaling · B A
        form="intact"     K = W                      W_eff = K + scaling · (B A − B0 A0)

    ``A`` and ``B`` start at ``A0`` and ``B0`` and train; all else is frozen.

    A subclass defines ``forward``, :meth:`_meta_like` and :meth:`to_plain`. One that keeps its weight in another way,
    such as quantized, gives ``kept=None`` and defines :meth:`base_matrix` and :meth:`_init_from` too.

    Shapes: ``lora_A, lora_A0 (rank, in)``, ``lora_B, lora_B0 (out, rank)``, ``bias (out,)``, ``base_weight`` as the
    layer multiplies by it. A stack of weights ``(E, out, in)`` has factors ``(E, rank, in)`` and ``(E, out, rank)``.

    Args:
        kept: an empty tensor for the kept weight, in its shape, dtype and device.
        bias: an empty tensor for the bias, or None.
        shape: of the matrix or the stack, ``(…, out, in)``.
        window: the window, or the rule that finds it.
        kind: of the plain layer, see :mod:`ipca.nn.layer_kinds`.
        alpha, form, dropout, adapter_dtype, tol: as for :class:`ipca.nn.LinearPC`.
        device, dtype: of the factors, where ``kept`` is None: the device, and the dtype that products are computed in.

    Raises:
        ValueError: an argument out of range, or a rank above ``min(out, in)``.
    """

    def __init__(
        self,
        kept: Tensor | None,
        bias: Tensor | None,
        shape: tuple[int, ...],
        window: Window,
        *,
        kind: str = "linear",
        alpha: float | None = None,
        form: str = "residual",
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
        tol: float | str = "default",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.matrix_shape = tuple(shape)
        *experts, self.out_features, self.in_features = shape
        self.requested_window, self.rank, self.kind = window, window.rank, kind
        self.alpha = float(self.rank if alpha is None else alpha)
        self.form, self.dropout, self.tol = form, float(dropout), tol
        check_options(form=form, dropout=self.dropout, alpha=self.alpha)
        d, one = min(shape[-2:]), tuple(shape[-2:])
        if self.rank > d:
            raise ValueError(f"rank {self.rank} is above the {d} singular values of a {one} weight; lower `rank`.")

        self.window: Window | None = None
        self.base_sha256: str | None = None
        self.svd_report: SVDReport | None = None
        self.certificate: InitCertificate | None = None
        self._disabled = False
        self._merged: Tensor | None = None

        if kept is not None:
            device, dtype = kept.device, kept.dtype
            self.base_weight = nn.Parameter(kept, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        adapter_dtype = adapter_dtype or default_adapter_dtype(dtype or torch.get_default_dtype())
        factor = torch.empty(0, dtype=adapter_dtype, device=device)
        self.lora_A = nn.Parameter(factor.new_empty(*experts, self.rank, self.in_features))
        self.lora_B = nn.Parameter(factor.new_empty(*experts, self.out_features, self.rank))
        self.register_buffer("lora_A0", torch.empty_like(self.lora_A, requires_grad=False))
        self.register_buffer("lora_B0", torch.empty_like(self.lora_B, requires_grad=False))
        self.lora_A0: Tensor
        self.lora_B0: Tensor

    def check_ready(self) -> None:
        """Raise RuntimeError where ``forward`` would compute nonsense: no window yet, or training while merged."""
        name = type(self).__name__
        if self.window is None:
            raise RuntimeError(f"This {name} has no window yet: load a state dict with load_state_dict().")
        if self.merged and not self._disabled and self.training and torch.is_grad_enabled():
            raise RuntimeError(f"A merged {name} cannot train: call unmerge() first, or eval().")

    def as_matrix(self, weight: Tensor) -> Tensor:
        """``weight``, in the shape of ``base_weight``, as ``(…, out, in)``."""
        return weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`as_matrix`."""
        return matrix

    def base_matrix(self) -> Tensor:
        """What is kept, ``W`` or ``W_res (…, out, in)``, in the dtype that products are computed in."""
        return self.as_matrix(self.base_weight)

    @property
    def scaling(self) -> float:
        """``alpha / rank``."""
        return self.alpha / self.rank

    @property
    def has_bias(self) -> bool:
        """Whether the layer adds a bias, its own or that of a layer it holds."""
        return self.bias is not None

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
        """``W_eff`` in the plain layer's shape, computed anew, for code that reads a weight without calling the layer.

        It is what ``forward`` multiplies by at the moment (disabled, merged or neither); gradients reach the factors.
        """
        if self._merged is not None and not self._disabled:
            return self._merged
        kept = self.base_matrix()
        if self._disabled and self.form == "intact":
            return self.as_weight(kept)
        B, A = (self.lora_B0, self.lora_A0) if self._disabled else (self.lora_B, self.lora_A)
        low = part_like(B.to(kept.dtype) @ A.to(kept.dtype), kept)
        if self.form == "intact":
            low = low - part_like(self.lora_B0.to(kept.dtype) @ self.lora_A0.to(kept.dtype), kept)
        return self.as_weight(kept + self.scaling * low)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """``W_eff (…, out, in)`` of the trained layer, added up in float64, in the weight's dtype, as a new tensor."""
        trained, frozen = (1, self.lora_B, self.lora_A), (-1, self.lora_B0, self.lora_A0)
        return self._plus(trained) if self.form == "residual" else self._plus(trained, frozen)

    @torch.no_grad()
    def pretrained_weight(self) -> Tensor:
        """The pretrained ``W (…, out, in)``, in the weight's dtype, as a new tensor (residual form: up to rounding)."""
        return self._plus((1, self.lora_B0, self.lora_A0)) if self.form == "residual" else self._plus()

    @torch.no_grad()
    def residual_weight(self) -> Tensor:
        """``W_res = W − scaling · B0 A0 (…, out, in)``, in the weight's dtype, as a new tensor."""
        return self._plus() if self.form == "residual" else self._plus((-1, self.lora_B0, self.lora_A0))

    def _plus(self, *terms: tuple[int, Tensor, Tensor]) -> Tensor:
        """``base_matrix + Σ sign · scaling · B A`` in float64, rounded once."""
        return add_low_rank(self.base_matrix(), [(sign * self.scaling, B, A) for sign, B, A in terms])

    @classmethod
    def _meta_like(cls: type[Layer], plain: nn.Module, window: Window, **options: Any) -> Layer:
        """A layer without a window yet, on the meta device, for what ``plain`` is; raises TypeError for another."""
        raise NotImplementedError

    @classmethod
    def from_layer(cls: type[Layer], plain: nn.Module, window: Window, **options: Any) -> Layer:
        """A layer that computes what ``plain`` does, which stays as it is; arguments and errors as for the class."""
        layer = cls._meta_like(plain, window, **options)
        layer._init_from(plain, layer._initial_factors(read_layer(plain)[0]))
        return layer

    @classmethod
    def from_factors(cls: type[Layer], plain: nn.Module, start: InitialFactors, **options: Any) -> Layer:
        """As :meth:`from_layer`, with the factors already at hand: no SVD."""
        layer = cls._meta_like(plain, start.window, adapter_dtype=start.A0.dtype, **options)
        layer._init_from(plain, start)
        return layer

    def _init_from(self, plain: nn.Module, start: InitialFactors) -> None:
        """Take the weight, bias and mode of ``plain``, and the factors of ``start``."""
        self._set_base(*read_layer(plain), start)
        self.train(plain.training)

    def _set_base(self, weight: Tensor, bias: Tensor | None, start: InitialFactors) -> None:
        """Keep ``weight (…, out, in)`` or its residual, ``bias``, and the factors of ``start``."""
        self.base_weight = nn.Parameter(self._base_for(weight, start), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._set_factors(start)

    def _set_factors(self, start: InitialFactors) -> None:
        """Put the factors of ``start`` in place, without copying ``A0`` and ``B0``."""
        factors = start.factors()
        self.lora_A, self.lora_B = nn.Parameter(factors["lora_A"]), nn.Parameter(factors["lora_B"])
        self.lora_A0, self.lora_B0 = factors["lora_A0"], factors["lora_B0"]
        self._record_init(start)

    def _initial_factors(self, weight: Tensor) -> InitialFactors:
        """The factors this layer would start from on the pretrained ``weight (…, out, in)``; changes nothing."""
        window, s, form, dtype = self.requested_window, self.scaling, self.form, self.lora_A.dtype
        return initial_factors(weight, window, scaling=s, form=form, adapter_dtype=dtype, tol=self.tol)

    def to_plain(self, *, base: bool = False) -> nn.Module:
        """A plain layer of the original type with the effective weight; shares no memory with this one.

        Args:
            base: with the pretrained weight instead.
        """
        raise NotImplementedError

    def _base_for(self, weight: Tensor, start: InitialFactors) -> Tensor:
        """What to keep of ``weight (…, out, in)``; in the intact form its own memory, where the layout allows."""
        kept = frozen_weight(weight, start.A0, start.B0, scaling=self.scaling, form=self.form)
        return self.as_weight(kept).contiguous()

    def _record_init(self, start: InitialFactors) -> None:
        self.window, self.base_sha256 = start.window, start.base_sha256
        self.svd_report, self.certificate = start.svd, start.certificate

    def merge(self) -> None:
        """Compute ``W_eff`` once and multiply by it alone. What is kept stays beside it, for :meth:`unmerge`."""
        if not self.merged:
            self._merged = self.as_weight(self.effective_weight()).contiguous()

    def unmerge(self) -> None:
        """Undo :meth:`merge`, to the bit."""
        self._merged = None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the layer computes the pretrained function (residual form: up to rounding)."""
        before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = before

    def extra_repr(self) -> str:
        return describe(self)

    def get_extra_state(self) -> Tensor:
        return encode_extra_state(self)

    def set_extra_state(self, state: Tensor) -> None:
        record = decode_extra_state(state)
        self.window = None if record["start"] is None else Window(record["start"], self.rank)
        self.base_sha256 = record["base_sha256"]
        self.svd_report = self.certificate = None

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *lists: Any
    ) -> None:
        try:
            assign = local_metadata.get("assign_to_params_buffers", False)
            state_dict, start = incoming_state(self, state_dict, prefix, assign)
        except (TypeError, ValueError) as error:
            lists[-1].append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
            return
        self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *lists)
        if start is not None and not self.lora_A.is_meta:
            self._record_init(start)

    def _apply(self, fn: Any, recurse: bool = True) -> WindowLayer:
        """Move or cast. Casting the residual form rounds its parts anew, so that they still add up to ``W``."""
        merged = self.merged
        self.unmerge()
        kept = self.base_matrix().detach() if self.form == "residual" else None
        A0, B0 = self.lora_A0, self.lora_B0
        super()._apply(fn, recurse)
        if kept is not None:
            reround(self, kept, A0, B0)
        if merged:
            self.merge()
        return self
