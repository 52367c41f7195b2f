"""Merging that is undone to the bit: a layer keeps its base weight while adapters are merged into it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ipca.nn.offload import is_offloaded

# A plain class when it runs, so that Python lets a stock layer take the class of one of ours.
_Mixed = LoraLayer if TYPE_CHECKING else object


class Kept(NamedTuple):
    """A copy of the base weight from before the merge, and the parameter with its version right after it.

    Where the base layer has another parameter or another version since, somebody has changed the merged weight.
    """

    weight: Tensor
    parameter: Tensor
    version: int


class ExactUnmerge(_Mixed):
    """A LoRA layer of PEFT that puts its base weight back when it is unmerged; PEFT subtracts, which rounds.

    PEFT's way remains for weights that are quantized, offloaded by accelerate or spread by ZeRO-3, and where somebody
    has changed the weight while it was merged.
    """

    _kept: Kept | None = None

    def base_parameter(self) -> Tensor:
        """The weight as the base layer holds it, or as accelerate keeps it for the layer."""
        raise NotImplementedError

    def holds(self, adapter: str) -> bool:
        """Whether the layer has an adapter of that name."""
        raise NotImplementedError

    def can_keep(self) -> bool:
        """Whether the base weight is a tensor to copy and to put back."""
        weight = self.base_parameter()
        spread = hasattr(weight, "ds_id") or is_offloaded(self.get_base_layer())
        return not (spread or weight.is_meta or weight.is_inference())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None, *, keep: bool = True) -> None:
        """Merge adapters as PEFT does.

        Args:
            safe_merge, adapter_names: as in PEFT.
            keep: the base weight as it is before the first merge, for :meth:`unmerge`.
        """
        weight = self._kept_weight() if keep else None
        names = self.active_adapters if adapter_names is None else adapter_names
        if keep and not self.merged and any(map(self.holds, names)) and self.can_keep():
            weight = _copy(self.base_parameter().detach())
        try:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        finally:
            self._keep(weight if self.merged else None)

    def unmerge(self) -> None:
        """Undo :meth:`merge`: put the base weight back, or subtract as PEFT does where none is kept."""
        weight = self._kept_weight()
        if weight is None or any(self.lora_bias.get(name) for name in self.merged_adapters):  # PEFT merges biases too
            super().unmerge()
        if weight is not None:
            self.merged_adapters.clear()
            with torch.no_grad():
                self.base_parameter().copy_(weight)
        self._keep(None)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, merged if that is asked for, with which PEFT replaces this one: nothing is kept."""
        if merge:
            self.merge(safe_merge, adapter_names, keep=False)
        return self.get_base_layer()

    def _keep(self, weight: Tensor | None) -> None:
        self._kept = None
        if weight is not None:
            parameter = self.base_parameter()
            self._kept = Kept(weight, parameter, parameter._version)

    def _kept_weight(self) -> Tensor | None:
        """The base weight as it was before the merge, unless somebody has changed the merged one; None without one."""
        if self._kept is None:
            return None
        parameter = self.base_parameter()
        same = parameter is self._kept.parameter and parameter._version == self._kept.version
        return self._kept.weight if same else None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast the kept weight with the others."""
        weight = self._kept_weight()
        super()._apply(fn, recurse)
        self._keep(None if weight is None else fn(weight))
        return self

    def __getstate__(self) -> dict[str, Any]:
        """The attributes, with the kept weight by itself: a copy's parameter counts its versions anew."""
        return {**vars(self), "_kept": self._kept_weight()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._keep(state.get("_kept"))


def _copy(weight: Tensor) -> Tensor:
    """A copy beside ``weight``, or on the CPU where its device has no room for one."""
    try:
        return weight.clone()
    except torch.OutOfMemoryError:
        return weight.to("cpu", copy=True)
