"""ExpertsPC: a module of experts that trains one window of each expert's pretrained weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.func import functional_call

from ipca.nn.attributes import take_attributes
from ipca.nn.layer_kinds import EXPERTS, ExpertStack, from_matrix, layer_kind, to_matrix, unsupported_reason
from ipca.nn.window_layer import LayerOptions, WindowLayer
from ipca.window import Window

if TYPE_CHECKING:
    from typing_extensions import Unpack


class StackPC(WindowLayer):
    """A stack of weights ``W (E, out, in)``, one for each expert, in each of which the same window trains.

    Called, without an input, it returns ``W_eff`` as the module of experts stores it.

    Shapes: ``base_weight, weight (E, out, in)``, or ``(E, in, out)`` for the kind ``"experts transposed"``,
    ``lora_A, lora_A0 (E, rank, in)``, ``lora_B, lora_B0 (E, out, rank)``.

    Args:
        stack: a plain stack, whose weight is not taken over yet.
        window: the window of every expert, or the rule that finds it.
        options: ``alpha``, ``form``, ``adapter_dtype``, ``tol``, as for :class:`ipca.nn.LinearPC`.

    Raises:
        TypeError: ``stack`` is another module.
        ValueError: an option is out of range.
    """

    def __init__(self, stack: nn.Module, window: Window, **options: Unpack[LayerOptions]) -> None:
        kind = layer_kind(stack)
        if kind not in EXPERTS or not isinstance(stack, ExpertStack):
            raise TypeError(f"expected a stack of experts' weights, got {type(stack).__name__}.")
        why = unsupported_reason(stack, kind, dropout=options.pop("dropout", 0.0))
        if why:
            raise ValueError(f"cannot adapt a stack of experts' weights: {why}.")
        base = stack.weight.detach().to("meta")
        super().__init__(base, None, tuple(to_matrix(kind, base).shape), window, kind=kind, **options)

    @classmethod
    def _meta_like(cls, plain: nn.Module, window: Window, **options: Unpack[LayerOptions]) -> StackPC:
        return cls(plain, window, **options)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return to_matrix(self.kind, weight)

    def as_weight(self, matrix: Tensor) -> Tensor:
        return from_matrix(self.kind, matrix, self.base_weight.shape)

    def forward(self) -> Tensor:
        self.check_ready()
        return self.computed_weight()

    def to_plain(self, *, base: bool = False) -> ExpertStack:
        weight = self.as_weight(self.pretrained_weight() if base else self.effective_weight()).contiguous()
        return ExpertStack(nn.Parameter(weight), self.kind == "experts transposed")


class ExpertsPC(nn.Module):
    """A module of experts some of whose stacks of weights train a window.

    ``base`` is the module itself, frozen. Each adapted stack is a :class:`StackPC` under the name of the parameter it
    stands for; every forward computes its ``W_eff`` once and puts it in the parameter's place. So ``base`` may use its
    weights in any way, at the cost of one more stack in memory, and of its gradient while training. While it runs the
    parameters of ``base`` are exchanged, so only one thread at a time may call it. The factors of the stack
    ``gate_up_proj`` are then ``experts.gate_up_proj.lora_A (E, rank, in)`` and ``lora_B (E, out, rank)``.

    Args:
        base: the module of experts, with parameters ``(E, out, in)`` or ``(E, in, out)``.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.training = base.training
        take_attributes(self, base)

    def stacks(self) -> dict[str, StackPC]:
        """The adapted stacks by the parameter's name."""
        return {name: module for name, module in self.named_children() if isinstance(module, StackPC)}

    def put(self, name: str, stack: StackPC | ExpertStack) -> None:
        """Put an adapted stack in the place of the parameter ``name`` of ``base``, or a plain one back there."""
        if isinstance(stack, ExpertStack):
            delattr(self, name)
            setattr(self.base, name, stack.weight)
        else:
            setattr(self.base, name, None)  # keeps its place in the order of the parameters
            setattr(self, name, stack)
            for parameter in self.base._parameters:  # stacks in that order, as PEFT nests them
                if parameter in self._modules:
                    self._modules[parameter] = self._modules.pop(parameter)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weights = {name: stack() for name, stack in self.stacks().items()}
        return functional_call(self.base, weights, args, kwargs)
