"""PEFT's layer around a bare parameter, with a window: the stacked experts of a mixture, or a matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import layer as lora
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ipca.io.peft_format import MATRIX, to_peft
from ipca.nn.initialization import InitialFactors
from ipca.nn.offload import keeps_weights, stored_tensor
from ipca.peft.layers import WindowLora


class ParamWrapper(WindowLora, lora.ParamWrapper):
    """A base that is one parameter: ``(out, in)``, or a stack of experts ``(E, out, in)``, each with its own window.

    PEFT recognizes the class by its name. It stores ``A`` as ``(E r, in)``, expert by expert, and ``B`` as
    ``(out, r E)``, rank by rank. The weight of a linear layer counts as that layer, whose keys and shapes it has.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, target_name: str = "", **kwargs: Any) -> None:
        base = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
        self.of_linear = isinstance(base, nn.Linear) and kwargs["parameter_name"] == "weight"
        path = target_name.removesuffix(".weight") if self.of_linear else target_name
        super().__init__(base_layer, adapter_name, target_name=path, **kwargs)

    @property
    def kind(self) -> str:
        if self._param_ndim == 2:
            return "linear" if self.of_linear else MATRIX
        return "experts" if self._did_swap_in_out_features else "experts transposed"

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        """No variant, which PEFT does not support here; :meth:`update_layer` does the variant's work."""
        if getattr(config, "window", None) is None:
            return super().resolve_lora_variant(config=config, **kwargs)
        return None

    def update_layer(self, adapter_name: str, r: int, lora_alpha: Any, config: Any, **kwargs: Any) -> None:
        """Add an adapter."""
        window = getattr(config, "window", None) is not None
        if window and keeps_weights(self.get_base_layer()):
            raise ValueError(
                f"{self.path}: accelerate keeps this weight on the CPU or the disk, and PEFT goes past its hook; load "
                "the model without offloading, or leave it out of target_parameters."
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
        if window:
            self.init_adapter(adapter_name, config)

    def base_parameter(self) -> Tensor:
        return stored_tensor(self.get_base_layer(), self.parameter_name)

    def base_matrix(self) -> Tensor:
        return self.in_layout(self.base_parameter().detach())

    def stored(self, initial: InitialFactors, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        A0, B0 = to_peft(self.kind, initial.A0, initial.B0)
        return A0.to(A), B0.to(B)

    def in_layout(self, matrix: Tensor) -> Tensor:
        return matrix if matrix.ndim == 2 or self._did_swap_in_out_features else matrix.mT

    def product(self, B: Tensor, A: Tensor) -> Tensor:
        if self._param_ndim == 2:
            return B @ A
        E = self.num_experts
        return B.reshape(len(B), -1, E).permute(2, 0, 1) @ A.reshape(E, -1, A.shape[-1])

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """Add the change as one tensor, which is exactly 0 before training; PEFT's single product is not."""
        self.note_call()
        adapters = [name for name in active_adapters if name in self.lora_A]
        if not any(self.pairs(name) for name in adapters):
            with super()._activate_lora(active_adapters):
                yield
            return
        base: Any = self.get_base_layer()
        name, trains = self.parameter_name, self.get_param().requires_grad
        change = lora._LoraParameterProxy(sum(self.get_delta_weight(adapter) for adapter in adapters))
        nn.utils.parametrize.register_parametrization(base, name, change)
        base.parametrizations[name].original.requires_grad_(trains)
        try:
            with nn.utils.parametrize.cached():
                yield
        finally:
            self._remove_parametrizations()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base module, with the adapters of all its parameters merged if that is asked for."""
        layer: Any = self
        while isinstance(layer, lora.ParamWrapper):
            if merge:
                layer.merge(safe_merge, adapter_names, **({"keep": False} if isinstance(layer, ParamWrapper) else {}))
            layer = layer.base_layer
        return self.get_base_layer()

    def get_delta_weight(self, adapter: str, *args: Any, **kwargs: Any) -> Tensor:
        """The change of the parameter, in its layout and dtype."""
        if self.pairs(adapter) is None:
            return super().get_delta_weight(adapter, *args, **kwargs)
        return self.change(adapter).to(self.get_param().dtype)
