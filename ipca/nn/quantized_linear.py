"""QuantizedLinearPC: a linear layer that trains a window beside its quantized weight."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipca.nn.initialization import InitialFactors
from ipca.nn.layer_kinds import build_layer
from ipca.nn.quantization import (
    dequantize,
    dequantized_dtype,
    quantization_kind,
    quantized_sha256,
    unsupported_quantization,
)
from ipca.nn.window_layer import LayerOptions, ProductLayer
from ipca.window import Window, as_window

if TYPE_CHECKING:
    from typing_extensions import Unpack

RESIDUAL = (
    "its weight is quantized, and the residual form would have to quantize W_res anew, which changes what the model "
    "computes; use the intact form"
)
"""Why there is no residual form."""


class QuantizedLinearPC(ProductLayer):
    """A linear layer with a quantized weight ``Q`` beside which a window of singular components trains.

    ::

        y = base(x) + scaling · (z Aᵀ Bᵀ − z A0ᵀ B0ᵀ),      z = dropout(x)

    ``base`` is the quantized layer itself, called for its product, so that before training the output is that of
    ``base`` to the bit, in every dtype and with dropout. ``A`` and ``B`` start at ``A0`` and ``B0``, the window of the
    unquantized weight where that is given, else of the dequantized one, and train; ``base`` is frozen. The only form is
    intact.

    Merged, the layer multiplies by ``dequantize(base) + scaling · (B A − B0 A0)`` in floats: quantizing the sum again
    would round away an update that is smaller than the steps of ``Q``.

    Shapes: ``x (…, in)``, ``y (…, out)``, ``lora_A, lora_A0 (rank, in)``, ``lora_B, lora_B0 (out, rank)``. The factors
    have ``adapter_dtype``, float32 by default, and are cast to the dtype of ``x``.

    Args:
        base: a layer that has a :func:`quantization_kind`; it becomes a part of this one. (A 4-bit
            weight then stays as it is in evaluation on a CPU too, where bitsandbytes would pack it for good.)
        window: the window, or the rule that finds it.
        options: alpha, form, dropout, adapter_dtype, tol: as for :class:`ipca.nn.LinearPC`.

    Raises:
        TypeError: ``base`` is not quantized.
        ValueError: it cannot be adapted, or an argument is out of range.
    """

    def __init__(self, base: nn.Module, window: Window, **options: Unpack[LayerOptions]) -> None:
        kind = quantization_kind(base)
        if kind is None:
            raise TypeError(f"expected a layer with a quantized weight, got {type(base).__name__}; use LinearPC.")
        why = unsupported_quantization(base) or (RESIDUAL if options.get("form") == "residual" else None)
        if why:
            raise ValueError(f"cannot adapt a {type(base).__name__}: {why}.")
        shape = (int(base.out_features), int(base.in_features))  # type: ignore[arg-type]
        super().__init__(None, None, shape, window, kind=kind, device="meta", dtype=torch.float32, **options)
        self.base = base
        self._packs = bool(getattr(base, "support_avx512bf16_for_cpu", False))

    @classmethod
    def _meta_like(cls, plain: nn.Module, window: Window, **options: Unpack[LayerOptions]) -> QuantizedLinearPC:
        return cls(plain, window, **options)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        window: Window | str | float = "middle",
        *,
        rank: int | None = None,
        unquantized: Tensor | None = None,
        **options: Unpack[LayerOptions],
    ) -> QuantizedLinearPC:
        """A layer around the quantized ``linear`` that computes the same.

        Args:
            linear: as ``base`` for the class.
            window, rank: as for :class:`ipca.nn.LinearPC`.
            unquantized: ``W (out, in)`` before it was quantized; its window is taken then.
            options: as for the class.

        Raises:
            TypeError, ValueError: as for the class; or ``unquantized`` is not what ``linear`` was quantized from.
        """
        layer = cls(linear, as_window(window, rank), **options)
        weight, source = quantized_source(linear, unquantized)
        layer._init_from(linear, layer._initial_factors(weight, source=source))
        return layer

    def _init_from(self, plain: nn.Module, initial: InitialFactors) -> None:
        assert plain is self.base
        if self._packs:
            plain.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        self._set_factors(initial)
        self.train(plain.training)

    def _initial_factors(
        self, weight: Tensor, *, digest: str | None = None, source: str = "dequantized"
    ) -> InitialFactors:
        initial = super()._initial_factors(weight, digest=digest or quantized_sha256(self.base))
        assert initial.svd is not None
        return replace(initial, svd=replace(initial.svd, source=source))

    def base_matrix(self) -> Tensor:
        return dequantize(self.base)

    def _weight_spec(self) -> tuple[torch.Size, torch.dtype, torch.device]:
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return torch.Size(self.matrix_shape), dequantized_dtype(self.base), weight.device

    def base_product(self, x: Tensor) -> Tensor:
        return self.base(x)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        bias = self._bias()
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))

    def to_plain(self, *, base: bool = False) -> nn.Module:
        """An ``nn.Linear`` with the effective weight in floats, or (``base``) the quantized layer itself."""
        if not base:
            weight, bias = self.effective_weight(), self._bias()
            # of one dtype: bitsandbytes casts the bias to the one it computes in, whatever it dequantizes to
            return build_layer("linear", weight, None if bias is None else bias.detach().to(weight.dtype, copy=True))
        if self._packs:
            self.base.support_avx512bf16_for_cpu = True  # type: ignore[assignment]
        return self.base

    @property
    def has_bias(self) -> bool:
        return self.base.bias is not None

    def extra_repr(self) -> str:
        return f"{self.kind}, {super().extra_repr()}"

    def _bias(self) -> Tensor | None:
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if prefix + "weight" in state_dict:
            *_, errors = rest
            errors.append(
                f"{prefix.rstrip('.') or type(self).__name__}: a plain weight cannot be loaded beside a quantized one; "
                "load it into the plain model, quantize that and adapt it anew."
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)


def quantized_source(module: nn.Module, unquantized: Tensor | None) -> tuple[Tensor, str]:
    """The matrix ``(out, in)`` that a quantized layer's window is taken from, on its device, and its source.

    Raises:
        TypeError, ValueError: as :func:`ipca.nn.quantization.dequantize`; or ``unquantized`` has another shape, is no
            float tensor, or is farther from the quantized weight than 0 is, and so cannot be what was quantized.
    """
    held = dequantize(module)
    if unquantized is None:
        return held, "dequantized"
    if unquantized.shape != held.shape:
        raise ValueError(f"the unquantized weight has shape {tuple(unquantized.shape)}, the layer {tuple(held.shape)}.")
    if not unquantized.is_floating_point():
        raise TypeError(f"the unquantized weight must hold floats, got {unquantized.dtype}.")
    unquantized = unquantized.detach().to(held.device)
    wide = unquantized.to(torch.promote_types(unquantized.dtype, torch.float32))
    distance, norm = torch.dist(wide, held.to(wide.dtype)), wide.norm()
    if not distance < norm:
        raise ValueError(
            f"the unquantized weight is no nearer to the quantized one than 0 is (‖W − Q‖ / ‖W‖ = "
            f"{distance / norm:.2f}); it is another layer's, another model's, or transposed."
        )
    return unquantized, "unquantized"
