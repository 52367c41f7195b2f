"""Initial factors ``A0, B0`` beside the trained ones in PEFT's modules; state dicts hold both in one tensor.

PEFT keeps ``A (r, in)`` as ``lora_A[adapter].weight`` and ``B (out, r)`` as ``lora_B[adapter].weight``. ``A0`` or
``B0`` is a buffer of the same module, and the module's state dict holds both under the one key ``weight``:
``[A; A0] (2 r, in)``, ``[B, −B0] (out, 2 r)``, a stock LoRA of rank ``2 r``. What PEFT, Trainer or
torch.distributed.checkpoint save is therefore what stock PEFT loads. That tensor is a copy, not the parameter's own
memory as in stock state dicts: :class:`HandedOut` notices who writes into it.

Experts stacked in one factor of PEFT, ``A (E r, in)`` expert by expert and ``B (out, r E)`` rank by rank, are doubled
within each expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from ipca.io.peft_format import Part, double_factor, split_factor
from ipca.nn.offload import stored_value

_SAME = 0.5
"""Share of directions from which two starts count as one window: two decompositions may differ at its ends."""


class HandedOut:
    """What a state dict got last in the place of a factor: a copy, into which somebody may write as into the factor.

    It keeps the version counter of the tensor, not its values. A copy of a model has handed out nothing.

    Args:
        on_write: called where the tensor has been written into.
    """

    def __init__(self, on_write: Callable[[], None]) -> None:
        self.on_write, self.version = on_write, 0
        self.counter: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return HandedOut, (self.on_write,)

    def watch(self, doubled: Tensor) -> None:
        """Check the tensor that was handed out before, and remember this one."""
        self.check()
        if type(doubled) is Tensor and not (doubled.is_meta or doubled.is_inference()):
            self.counter = doubled.detach().set_()  # type: ignore[call-overload]  # empty, with the same counter
            self.version = self.counter._version

    def check(self) -> None:
        """Call ``on_write`` where the tensor was written into since it was handed out."""
        if self.counter is not None and self.counter._version != self.version:
            self.counter = None
            self.on_write()


def check_handed_out(owner: nn.Module, name: str) -> None:
    """Notice writes into what a state dict got in the place of the parameter ``name``."""
    handed_out: HandedOut | None = vars(owner).get(f"handed_out_{name}")
    if handed_out is not None:
        handed_out.check()


def register_initial(
    owner: nn.Module,
    name: str,
    part: Part,
    initial: Tensor,
    *,
    experts: int = 1,
    on_save: Callable[[], None] | None = None,
    on_other: Callable[[], None] | None = None,
    on_write: Callable[[], None],
) -> None:
    """Keep ``initial`` beside the parameter ``name`` of ``owner``, and double that parameter in state dicts.

    Args:
        owner: PEFT's module for one factor of one adapter, or its ``ParameterDict`` (embeddings).
        name: of the parameter there: ``"weight"``, or the adapter's name.
        part: which factor it is.
        initial: ``A0`` or ``B0``, in the parameter's shape.
        experts: stacked in the factor.
        on_save: called whenever the doubled factor is put into a state dict.
        on_other: called whenever an ``A0`` of another window is loaded.
        on_write: called where somebody has written into what a state dict got, and which the factor does not follow.
    """
    owner.register_buffer(initial_name(name), initial, persistent=False)
    hooks = (
        owner.register_state_dict_post_hook(partial(_double, name, part, experts, on_save)),
        owner.register_load_state_dict_pre_hook(partial(_halve, name, part, experts, on_other)),
    )
    setattr(owner, f"hooks_of_{name}", hooks)
    setattr(owner, f"layout_of_{name}", (part, experts))
    setattr(owner, f"handed_out_{name}", HandedOut(on_write))


def remove_initial(owner: nn.Module, name: str) -> None:
    """Undo :func:`register_initial`, where it was called: another adapter may take the name."""
    if has_initial(owner, name):
        delattr(owner, initial_name(name))
        delattr(owner, f"layout_of_{name}")
        delattr(owner, f"handed_out_{name}")
        for hook in owner.__dict__.pop(f"hooks_of_{name}"):
            hook.remove()


def initial_name(name: str) -> str:
    """The name of the buffer that holds the initial value of the parameter ``name``."""
    return f"initial_{name}"


def move_pair(owner: nn.Module, name: str, device: torch.device) -> None:
    """Move the parameter ``name`` and its initial value to ``device``, and nothing else that ``owner`` holds."""
    parameter, initial = owner.get_parameter(name), owner.get_buffer(initial_name(name))
    if parameter.device != device and not parameter.is_meta:
        moved = nn.Parameter(parameter.detach().to(device), requires_grad=parameter.requires_grad)
        owner.register_parameter(name, moved)
    if initial.device != device and not initial.is_meta:
        owner.register_buffer(initial_name(name), initial.to(device), persistent=False)


def has_initial(owner: nn.Module, name: str) -> bool:
    """Whether an initial value is kept beside the parameter ``name``."""
    return initial_name(name) in owner._buffers


def initial_factor(owner: nn.Module, name: str) -> Tensor | None:
    """The initial value kept beside the parameter ``name``, where both still have one shape.

    PEFT's hot-swap may have put a stock LoRA of another rank into the parameter, which needs no initial factors.
    """
    initial, parameter = owner._buffers.get(initial_name(name)), owner._parameters.get(name)
    fits = initial is not None and parameter is not None and parameter.shape == initial.shape
    return initial if fits else None


LOST = (
    "its factors were replaced by others, without the initial factors of the window, as "
    "prepare_model_for_compiled_hotswap(target_rank=…) does; load the saved adapter with stock PEFT for that, "
    "without a PCConfig"
)


def misfit(A: Tensor, B: Tensor, *, empty: bool) -> str:
    """The reason why ``A, B``, which may be ``empty``, do not belong to their initial factors, or an empty text."""
    if any(getattr(factor, "_is_hf_initialized", False) for factor in (A, B)):  # transformers marks what it loads
        return (
            "transformers' load_adapter replaced the factors, but not the initial ones; load saved adapters "
            "without a PCConfig, or with peft.PeftModel.from_pretrained"
        )
    if empty:  # torch would multiply with it and raise nothing
        return "it was made with low_cpu_mem_usage; load its file before using it"
    return ""


class TrainedFactors(Mapping[str, Tensor]):
    """The weights that accelerate keeps for ``owner``, taken from a state dict: of two factors in one the trained one.

    Args:
        weights: by name, read when they are asked for.
        owner: as for :func:`register_initial`.
    """

    def __init__(self, weights: Mapping[str, Tensor], owner: nn.Module) -> None:
        self.weights = weights
        self.layouts = {
            name: (*vars(owner)[f"layout_of_{name}"], 2 * owner.get_buffer(initial_name(name)).numel())
            for name in owner._parameters
            if has_initial(owner, name)
        }

    def __getitem__(self, name: str) -> Tensor:
        value = self.weights[name]
        part, experts, doubled = self.layouts.get(name, ("A", 1, 0))
        return split_factor(part, value, experts)[0] if value.numel() == doubled else value

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def _double(
    name: str,
    part: Part,
    experts: int,
    on_save: Callable[[], None] | None,
    owner: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
) -> None:
    initial, key = initial_factor(owner, name), prefix + name
    if initial is None or key not in state_dict:
        return
    factor, whole = stored_value(owner, name, state_dict[key]), initial.detach()
    if factor.is_meta and not whole.is_meta:
        raise RuntimeError(
            f"{key} holds no values: the adapter was loaded onto an offloaded base, from which PEFT takes accelerate's "
            "hooks. Load the base without offloading, load the adapter, and offload then (accelerate.cpu_offload)."
        )
    if isinstance(factor, DTensor):  # every rank has all of the initial factor
        whole = DTensor.from_local(whole, factor.device_mesh, [Replicate()] * factor.device_mesh.ndim)
    state_dict[key] = double_factor(part, factor, whole, experts)
    vars(owner)[f"handed_out_{name}"].watch(state_dict[key])
    if on_save is not None:
        on_save()


def _shared(initial: Tensor, loaded: Tensor, experts: int) -> float:
    """The share of directions, rows of ``A0``, that two starts have in common: 1 of one window, 0 of disjoint ones."""
    one, two = (rows.reshape(experts, -1, rows[0].numel()).float() for rows in (initial, loaded.to(initial.device)))
    one, two = (nn.functional.normalize(rows, dim=-1) for rows in (one, two))
    return float((one @ two.mT).square().sum() / max(1, one.shape[0] * one.shape[1]))


def _halve(
    name: str,
    part: Part,
    experts: int,
    on_other: Callable[[], None] | None,
    owner: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    initial, key = initial_factor(owner, name), prefix + name
    if initial is None or key not in state_dict:
        return
    vars(owner)[f"handed_out_{name}"].counter = None  # written into to be loaded, as distributed checkpoints are
    both, wanted, axis = state_dict[key], list(initial.shape), 0 if part == "A" else 1
    wanted[axis] *= 2
    if list(both.shape) != wanted:
        error_msgs.append(
            f"{key} has shape {tuple(both.shape)}, but the adapter's trained and initial factor take {tuple(wanted)}; "
            "it was saved with another rank, or not by a PCConfig."
        )
        del state_dict[key]
        return
    state_dict[key], loaded = split_factor(part, both, experts)
    if isinstance(loaded, DTensor):
        loaded = loaded.full_tensor()
    if on_other is not None and not initial.is_meta and _shared(initial, loaded, experts) < _SAME:
        on_other()
    if initial.is_meta or local_metadata.get("assign_to_params_buffers", False):
        owner.register_buffer(initial_name(name), loaded, persistent=False)
    else:
        with torch.no_grad():
            initial.copy_(loaded)
