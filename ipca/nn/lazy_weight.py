"""LazyWeight: the effective weight of an adapted layer, computed where a computation needs it, and read-only.

Code that reads ``layer.weight`` must get ``W_eff``, but most of it asks for a dtype, a device or a shape, which must
not cost a product. And what was computed a moment ago would take a write without any effect, which must not pass in
silence. So the attribute is a tensor without values, of a subclass whose ``__torch_function__`` sees every use of it:

| use | result |
|---|---|
| ``shape``, ``dtype``, ``device``, ``requires_grad`` | answered at once |
| a computation | that of the product ``W_eff``, whose gradient reaches the factors |
| a view, ``detach()``, ``data`` | read-only like the weight itself |
| an in-place write, an assignment | RuntimeError |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

if TYPE_CHECKING:
    from typing import Protocol

    class _Layer(Protocol):
        """The part of :class:`ipca.nn.WindowLayer` that is needed here."""

        lora_A: nn.Parameter
        lora_B: nn.Parameter

        @property
        def scaling(self) -> float: ...
        @property
        def is_plain(self) -> bool: ...
        @property
        def is_disabled(self) -> bool: ...
        def as_matrix(self, weight: Tensor) -> Tensor: ...
        def computed_weight(self) -> Tensor: ...


_READ_ONLY = (
    "The weight of an adapted layer is computed from base_weight, lora_A and lora_B, so writing into it would change "
    "nothing. Call ipca.unload(model) first, which puts plain layers back, or write into base_weight, lora_A or "
    "lora_B; for a copy to change call .clone()."
)
_AUGMENTED = [
    "add",
    "sub",
    "mul",
    "matmul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
]
_WRITES = {"__set__", "__setitem__", "__delitem__", *(f"__i{name}__" for name in _AUGMENTED)}
_METADATA = {
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.element_size),
    *(Tensor.is_floating_point, Tensor.is_complex, torch.numel, torch.is_floating_point, torch.is_complex),
    *(getattr(Tensor, name).__get__ for name in ("ndim", "is_cuda", "is_meta", "layout")),
}
Spec = tuple[torch.Size, torch.dtype, torch.device]


class LazyWeight(Tensor):
    """A tensor whose values are computed when it is used; see the module. :func:`lazy_weight` makes it."""

    _spec: Spec
    _trains: bool
    _compute: Callable[[], Tensor]

    # Python properties: those of torch.Tensor would pass __torch_function__, which takes ten times as long.
    shape = property(lambda self: self._spec[0])
    dtype = property(lambda self: self._spec[1])
    device = property(lambda self: self._spec[2])
    requires_grad = property(lambda self: self._trains, lambda self, value: _raise_read_only())
    grad = property(lambda self: None, lambda self, value: _raise_read_only())
    is_leaf = property(lambda self: False)  # no optimizer takes it for a parameter

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _WRITES or (name.endswith("_") and not name.endswith("__")):
            written: Any = (args[:1], kwargs.get("input"), kwargs.get("tensor"), kwargs.get("self"))
        else:
            written = kwargs.get("out")
        if any(isinstance(leaf, LazyWeight) for leaf in tree_leaves(written)):
            _raise_read_only()
        computed: dict[int, Tensor] = {}

        def compute(weight: LazyWeight) -> Tensor:
            return computed.setdefault(id(weight), weight._compute())

        args, kwargs = tree_map_only(LazyWeight, compute, (args, kwargs))
        memory = {_memory(tensor) for tensor in computed.values()} - {0}
        result = func(*args, **kwargs)
        return tree_map_only(Tensor, lambda value: _read_only(value) if _memory(value) in memory else value, result)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Reached only where __torch_function__ is switched off.
        args, kwargs = tree_map_only(LazyWeight, lambda weight: weight._compute().detach(), (args, kwargs or {}))
        return func(*args, **kwargs)


class _FromFactors(torch.autograd.Function):
    """A LazyWeight as a function of the factors: autograd functions that take it as an input pass a gradient back."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor, layer: _Layer, spec: Spec) -> Tensor:
        ctx.factors, ctx.layer = (A, B), layer
        return _make(spec, True, layer.computed_weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (A, B), layer = ctx.factors, ctx.layer
        G = layer.scaling * layer.as_matrix(grads[0]).to(A.dtype)
        return B.mT @ G, G @ A.mT, None, None


class _FromTensor(torch.autograd.Function):
    """A LazyWeight that stands for a view of another one."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _make((tensor.shape, tensor.dtype, tensor.device), True, lambda: tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


# The C++ method itself: what torch.autograd.Function.apply does around it takes longer than all the rest here.
_from_factors = super(torch.autograd.Function, _FromFactors).apply


def lazy_weight(layer: _Layer, spec: Spec) -> Tensor:
    """``layer.computed_weight()`` as a :class:`LazyWeight`; ``spec`` is its shape, dtype and device."""
    A, B = layer.lora_A, layer.lora_B
    trains = (A.requires_grad or B.requires_grad) and not (layer.is_plain or layer.is_disabled)
    if trains and torch.is_grad_enabled():
        return _from_factors(A, B, layer, spec)
    return _make(spec, trains, layer.computed_weight)


def _read_only(tensor: Tensor) -> Tensor:
    """``tensor``, which shares memory with a computed weight, as a LazyWeight."""
    if tensor.requires_grad and torch.is_grad_enabled():
        return _FromTensor.apply(tensor)
    return _make((tensor.shape, tensor.dtype, tensor.device), tensor.requires_grad, lambda: tensor)


def _make(spec: Spec, trains: bool, compute: Callable[[], Tensor]) -> Tensor:
    weight: LazyWeight = Tensor._make_wrapper_subclass(LazyWeight, spec[0], dtype=spec[1], device=spec[2])
    weight._spec, weight._trains, weight._compute = spec, trains, compute
    return weight


def _memory(tensor: Tensor) -> int:
    """The address of the memory of ``tensor``; 0 where it has none of its own, as on the meta device."""
    return tensor.untyped_storage().data_ptr() if type(tensor) is Tensor and not tensor.is_meta else 0


def _raise_read_only() -> NoReturn:
    raise RuntimeError(_READ_ONLY)
