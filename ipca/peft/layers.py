"""PEFT's LoRA layers with a window: what all kinds share, and linear, embedding and convolution layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import layer as lora
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ipca._hashing import tensor_sha256
from ipca.io.peft_format import to_peft
from ipca.nn.initialization import InitialFactors
from ipca.nn.quantization import dequantize, quantization_kind, quantized_sha256
from ipca.ops import pc_linear
from ipca.peft.factors import LOST, has_initial, initial_factor, misfit, move_pair, register_initial, remove_initial
from ipca.peft.variant import WindowVariant

if TYPE_CHECKING:
    from peft import LoraConfig

    from ipca.peft.config import PCConfig

# A plain class when it runs, so that Python lets a stock layer take the class of one of ours.
_Mixed = LoraLayer if TYPE_CHECKING else object
_HOOKS = ("forward", "forward_pre", "backward", "backward_pre")


class WindowLora(_Mixed):
    """What every kind of layer does with an adapter of a PCConfig; stock adapters beside it stay PEFT's matter.

    The base weight counts as a matrix ``(out, in)``, ``A, A0`` as ``(r, in)``, ``B, B0`` as ``(out, r)``, in whatever
    shape PEFT stores them.
    """

    kind = "linear"

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, target_name: str = "", **kwargs: Any) -> None:
        self.path = target_name
        super().__init__(base_layer, adapter_name, **kwargs)

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        """PEFT's question which variant an adapter is; its own layers refuse a config with a window."""
        if getattr(config, "window", None) is None:
            return super().resolve_lora_variant(config=config, **kwargs)
        return WindowVariant()

    def base_parameter(self) -> Tensor:
        """The tensor the base layer holds."""
        return self.get_base_layer().weight

    def base_matrix(self) -> Tensor:
        """The base weight as ``(out, in)``, a float tensor."""
        return self.base_parameter().detach()

    def base_sha256(self) -> str:
        """How an adapter knows the base weight it belongs to."""
        return tensor_sha256(self.base_matrix())

    def holds(self, adapter: str) -> bool:
        """Whether the layer has an adapter of that name."""
        return adapter in self.lora_A or adapter in self.lora_embedding_A

    def owners(self, adapter: str) -> tuple[tuple[nn.Module, str], tuple[nn.Module, str]]:
        """The modules of PEFT that hold ``A`` and ``B``, and the parameters' names there."""
        return (self.lora_A[adapter], "weight"), (self.lora_B[adapter], "weight")

    def stored(self, start: InitialFactors, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """``A0, B0`` in the shapes, the dtype and on the device of ``A, B``."""
        kernel = self.base_parameter().shape[2:] if self.kind == "conv" else ()
        A0, B0 = to_peft(self.kind, start.A0, start.B0, kernel)
        return A0.to(A), B0.to(B)

    def init_adapter(self, adapter: str, config: PCConfig) -> None:
        """Set ``A = A0`` and ``B = B0``, the window of the base weight, and keep ``A0, B0`` beside them."""
        (in_A, name_A), (in_B, name_B) = self.owners(adapter)
        A, B = in_A.get_parameter(name_A), in_B.get_parameter(name_B)
        if A.is_meta or self.base_parameter().is_meta:  # low_cpu_mem_usage: a file is about to be loaded
            if not self.base_parameter().is_meta:
                config.check_base(self)
            A0, B0 = torch.empty_like(A, device="meta"), torch.empty_like(B, device="meta")
        else:
            with gather_params_ctx(self.base_parameter()):
                A0, B0 = self.stored(config.begin(self, adapter, A.dtype), A.detach(), B.detach())
            if config.init_lora_weights:
                with torch.no_grad():
                    A.copy_(A0)
                    B.copy_(B0)
        experts, saved = getattr(self, "num_experts", 1), config.on_save(self.path)
        register_initial(in_A, name_A, "A", A0, experts=experts, saved=saved)
        register_initial(in_B, name_B, "B", B0, experts=experts, saved=saved)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT's, which after loading with ``low_cpu_mem_usage`` would also round the factors to the base's dtype."""
        owners = self.owners(adapter_name) if self.holds(adapter_name) else ()
        if owners and all(has_initial(owner, name) for owner, name in owners):
            for owner, name in owners:
                move_pair(owner, name, device or self.base_parameter().device)
        else:
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's, which leaves in an embedding's dictionaries what is not a parameter."""
        owners = self.owners(adapter_name) if self.holds(adapter_name) else ()
        super().delete_adapter(adapter_name)
        for owner, name in owners:
            remove_initial(owner, name)

    def pairs(self, adapter: str) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """``A, B, A0, B0`` of an adapter with a start, else None.

        Raises:
            RuntimeError: the factors do not belong to the start, or hold nothing yet; see :func:`misfit`.
        """
        (in_A, name_A), (in_B, name_B) = self.owners(adapter)
        A0, B0 = initial_factor(in_A, name_A), initial_factor(in_B, name_B)
        if A0 is None or B0 is None:
            window = isinstance(self.lora_variant.get(adapter), WindowVariant)
            if window and not (has_initial(in_A, name_A) and has_initial(in_B, name_B)):
                raise RuntimeError(f"{self.path}: the adapter {adapter!r} cannot be computed: {LOST}.")
            return None
        A, B = in_A.get_parameter(name_A), in_B.get_parameter(name_B)
        why = misfit(A, B, self.base_parameter())
        if why:
            raise RuntimeError(f"{self.path}: the adapter {adapter!r} cannot be computed: {why}.")
        return A, B, A0, B0

    def change(self, adapter: str) -> Tensor:
        """``scaling · (B A − B0 A0)`` in the layout of the base weight, float32 or wider."""
        pair = self.pairs(adapter)
        assert pair is not None
        wide = torch.promote_types(pair[0].dtype, torch.float32)
        A, B, A0, B0 = (tensor.to(wide) for tensor in pair)
        return self.in_layout(self.scaling[adapter] * (self.product(B, A) - self.product(B0, A0)))

    def product(self, B: Tensor, A: Tensor) -> Tensor:
        """``B A (out, in)`` of factors as PEFT stores them."""
        return B.flatten(1) @ A.flatten(1)

    def in_layout(self, matrix: Tensor) -> Tensor:
        """A matrix ``(out, in)`` in the layout of the base weight."""
        return matrix

    def get_delta_weight(self, adapter: str) -> Tensor:
        """PEFT's question for the change of the base weight."""
        if self.pairs(adapter) is None:
            return super().get_delta_weight(adapter)
        owner, name = self.owners(adapter)[1]
        return self.change(adapter).to(owner.get_parameter(name).dtype)

    def low_rank(self, adapter: str, x: Tensor) -> Tensor:
        """``scaling · (z Aᵀ Bᵀ − z A0ᵀ B0ᵀ)``, exactly 0 while ``A = A0`` and ``B = B0``."""
        z, lora_A, lora_B = self.lora_dropout[adapter](x), self.lora_A[adapter], self.lora_B[adapter]
        pair, trained = self.pairs(adapter), lora_B(lora_A(z))
        if pair is None:
            return trained * self.scaling[adapter]
        A0, B0 = pair[2].to(pair[0].dtype), pair[3].to(pair[1].dtype)
        return (trained - self.apply_factor(lora_B, self.apply_factor(lora_A, z, A0), B0)) * self.scaling[adapter]

    def apply_factor(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """What ``module(x)`` computes, with another weight."""
        return F.linear(x, weight)


class QuantizedWindowLora(WindowLora):
    """A base whose weight is quantized: the window is that of the dequantized weight."""

    @property
    def kind(self) -> str:
        return str(quantization_kind(self.get_base_layer()))

    def base_matrix(self) -> Tensor:
        return dequantize(self.get_base_layer())

    def base_sha256(self) -> str:
        return quantized_sha256(self.get_base_layer())


class WindowLinear(WindowLora, lora.Linear):
    """A base of type ``nn.Linear`` or transformers' ``Conv1D``."""

    def base_matrix(self) -> Tensor:
        return self.in_layout(self.base_parameter().detach())

    def in_layout(self, matrix: Tensor) -> Tensor:
        return matrix.mT if self.fan_in_fan_out else matrix

    @property
    def kind(self) -> str:
        return "conv1d" if self.fan_in_fan_out else "linear"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = None if args or kwargs else self.fused_adapter(x)
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        pair = self.pairs(adapter)
        assert pair is not None
        A, B, A0, B0 = pair
        dropout = getattr(self.lora_dropout[adapter], "p", 0.0) if self.training else 0.0
        weight = self.in_layout(base.weight)
        return pc_linear(x, weight, A, B, base.bias, scaling=self.scaling[adapter], A0=A0, B0=B0, dropout=dropout)

    def fused_adapter(self, x: Tensor) -> str | None:
        """The one adapter with a window that is active, where a single op computes what PEFT's forward would.

        Nothing that others have attached to the base layer or to the factors may be left out.
        """
        if self.disable_adapters or self.merged:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        pair = self.pairs(active[0]) if len(active) == 1 else None
        if pair is None or any(factor.device != x.device for factor in pair):
            return None
        base = self.get_base_layer()
        called = (self.base_layer, self.lora_A[active[0]], self.lora_B[active[0]], self.lora_dropout[active[0]])
        plain = type(base) in (nn.Linear, Conv1D) and base is self.base_layer and type(base.weight.data) is Tensor
        if not plain or any(is_watched(module) for module in called):
            return None
        fits = x.dtype == base.weight.dtype or torch.is_autocast_enabled(x.device.type)
        return active[0] if fits else None


def is_watched(module: nn.Module) -> bool:
    """Whether something happens beside ``forward`` when ``module`` is called."""
    return "forward" in vars(module) or any(getattr(module, f"_{hooks}_hooks") for hooks in _HOOKS)


class WindowEmbedding(WindowLora, lora.Embedding):
    """A base of type ``nn.Embedding``: ``out`` is the embedding's dimension, ``in`` the number of embeddings."""

    kind = "embedding"

    def base_matrix(self) -> Tensor:
        return self.base_parameter().detach().mT

    def in_layout(self, matrix: Tensor) -> Tensor:
        return matrix.mT

    def owners(self, adapter: str) -> tuple[tuple[nn.Module, str], tuple[nn.Module, str]]:
        return (self.lora_embedding_A, adapter), (self.lora_embedding_B, adapter)

    def low_rank(self, adapter: str, x: Tensor) -> Tensor:
        """As for the class; ``x`` holds indices."""
        pair = self.pairs(adapter)
        A, B = (self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]) if pair is None else pair[:2]
        y = self._embed(x, A.T) @ B.T
        if pair is not None:
            A0, B0 = pair[2].to(A.dtype), pair[3].to(B.dtype)
            y = y - self._embed(x, A0.T) @ B0.T
        scale = self._get_embed_scale()
        return y * self.scaling[adapter] if scale is None else y * self.scaling[adapter] * scale.to(y.dtype)

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """PEFT's, which asks no variant for embeddings."""
        result = self.base_layer(x, *args, **kwargs)
        for adapter in sorted(set(adapter_names) & set(self.lora_embedding_A)):
            rows = [row for row, name in enumerate(adapter_names) if name == adapter]
            result[rows] += self.low_rank(adapter, x[rows]).to(result.dtype)
        return result


class _WindowConv(WindowLora):
    """A convolution: ``in`` is (channels · kernel), as PEFT flattens it."""

    kind = "conv"

    def base_matrix(self) -> Tensor:
        return self.base_parameter().detach().flatten(1)

    def in_layout(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.base_parameter().shape)

    def apply_factor(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        return module._conv_forward(x, weight, None)  # type: ignore[operator]


class WindowConv1d(_WindowConv, lora.Conv1d):
    """A base of type ``nn.Conv1d``."""


class WindowConv2d(_WindowConv, lora.Conv2d):
    """A base of type ``nn.Conv2d``."""


class WindowConv3d(_WindowConv, lora.Conv3d):
    """A base of type ``nn.Conv3d``."""
