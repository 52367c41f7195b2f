"""ConvPC: a convolution that trains one window of its pretrained weight's singular components."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from ipca.nn.layer_kinds import from_matrix, layer_kind, to_matrix, unsupported_reason
from ipca.nn.window_layer import LayerOptions, ProductLayer
from ipca.window import Window

if TYPE_CHECKING:
    from typing_extensions import Unpack

_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class ConvPC(ProductLayer):
    """``nn.Conv1d``, ``Conv2d`` or ``Conv3d`` of which a window of the flattened weight's components trains.

    The weight ``(out, channels, k…)`` is the matrix ``W (out, channels · k…)`` that multiplies the patches of ``x``::

        y = conv(x, K) + bias + scaling · (conv(conv(z, A), B) − conv(conv(z, A0), B0)),      z = dropout(x)

    with the factors as kernels, ``A (rank, channels, k…)`` with the layer's stride and padding, ``B (out, rank, 1…)``;
    the last term is the intact form's.

    Shapes: ``x (N, channels, …)``, ``y (N, out, …)``, ``base_weight, weight (out, channels, k…)``, ``bias (out,)``,
    ``lora_A, lora_A0 (rank, channels · k…)``, ``lora_B, lora_B0 (out, rank)``.

    Args:
        conv: a plain convolution; its settings are taken over, its weight is not.
        window: the window, or the rule that finds it.
        options: ``alpha``, ``form``, ``dropout``, ``adapter_dtype``, ``tol``, as for :class:`ipca.nn.LinearPC`.

    Raises:
        TypeError: ``conv`` is another type.
        ValueError: it has groups, dilation or a padding mode, or an option is out of range.
    """

    def __init__(self, conv: nn.Module, window: Window, **options: Unpack[LayerOptions]) -> None:
        if layer_kind(conv) != "conv":
            raise TypeError(f"expected an nn.Conv1d, nn.Conv2d or nn.Conv3d, got {type(conv).__name__}.")
        assert isinstance(conv, nn.modules.conv._ConvNd)
        why = unsupported_reason(conv, "conv")
        if why:
            raise ValueError(f"cannot adapt this {type(conv).__name__}: {why}.")
        base, bias = conv.weight.detach().to("meta"), None if conv.bias is None else conv.bias.detach().to("meta")
        shape = (base.shape[0], base[0].numel())
        super().__init__(base, bias, shape, window, kind="conv", **options)
        self.in_channels, self.out_channels, self.kernel_size = conv.in_channels, conv.out_channels, conv.kernel_size
        self.stride, self.padding, self.padding_mode = conv.stride, conv.padding, conv.padding_mode
        self.dilation, self.groups = conv.dilation, conv.groups

    @classmethod
    def _meta_like(cls, plain: nn.Module, window: Window, **options: Unpack[LayerOptions]) -> ConvPC:
        return cls(plain, window, **options)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return to_matrix(self.kind, weight)

    def as_weight(self, matrix: Tensor) -> Tensor:
        return from_matrix(self.kind, matrix, self.base_weight.shape)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return _CONV[weight.ndim](x, weight, self.bias, self.stride, self.padding)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        conv, kernel = _CONV[self.base_weight.ndim], self.base_weight.shape[1:]
        h = conv(x, A.to(x.dtype).reshape(-1, *kernel), None, self.stride, self.padding)
        return conv(h, B.to(x.dtype).reshape(*B.shape, *(1 for _ in self.kernel_size)))

    def to_plain(self, *, base: bool = False) -> nn.Module:
        weight = self.as_weight(self.pretrained_weight() if base else self.effective_weight())
        build = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[weight.ndim]
        conv = build(
            self.in_channels,
            self.out_channels,
            self.kernel_size,  # type: ignore[arg-type]
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            bias=self.bias is not None,
            device="meta",
        )
        conv.weight = nn.Parameter(weight)
        conv.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())
        return conv

    def extra_repr(self) -> str:
        geometry = f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
        return f"{super().extra_repr()}, {geometry}"
