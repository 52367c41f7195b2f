"""LazyWeight: the effective weight of an adapted layer, computed where a computation needs it, and read-only.

Code that reads ``layer.weight`` must get ``W_eff``, but most of it asks for a dtype, a device or a shape, which must
not cost a product. And what was computed a moment ago would take a write without any effect, which must not pass in
silence. So the attribute is a tensor without values, of a subclass whose ``__torch_function__`` sees every use of it:

| use | result |
|---|---|
| ``shape``, ``dtype``, ``device``, ``requires_grad``, ``size()`` | answered at once |
| a computation | that of the product ``W_eff``, whose gradient reaches the factors |
| a view, ``detach()``, ``data`` | read-only like the weight itself |
| an in-place write, an assignment, a hook | RuntimeError |

Like a parameter it follows its layer: a LazyWeight that is held while the factors train has their present values.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ipca.ops.pair import optimizer_steps

_READ_ONLY = (
    "The weight of an adapted layer is computed from base_weight, lora_A and lora_B, so writing into it would change "
    "nothing. Call ipca.unload(model) first, which puts plain layers back, or write into base_weight, lora_A or "
    "lora_B; for a copy to change call .clone()."
)
_NO_HOOKS = (
    "The weight of an adapted layer has no gradient of its own: gradients reach lora_A and lora_B. Register the hook "
    "on those, or on a tensor computed from the weight."
)
_TRACED = (
    "the weight of an adapted layer was read outside of what torch.compile traces; pass the layer and read it there"
)
_ARITHMETIC = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow")
_BITWISE = ("and", "or", "xor", "lshift", "rshift")
_WRITES = {"__set__", "__setitem__", "__delitem__", *(f"__i{name}__" for name in (*_ARITHMETIC, *_BITWISE))}
_HOOKS = {"register_hook", "register_post_accumulate_grad_hook", "retain_grad"}
_POINTERS = {Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage}
_PROPERTIES = ("ndim", "layout", "itemsize", "nbytes", "is_cpu", "is_cuda", "is_meta", "is_nested", "is_sparse")
_METADATA = {
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.is_complex, torch.numel, torch.is_floating_point, torch.is_complex),
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
}

Spec = tuple[torch.Size, torch.dtype, torch.device]
"""The shape, dtype and device of a weight."""


class LazyWeight(Tensor):
    """A tensor whose values are computed when it is used; see the module. :func:`make_lazy_weight` makes it."""

    _spec: Spec
    _trains: bool
    _source: Any  # a WindowLayer, or the tensor that a view stands for
    _disabled: bool  # whether the layer was when the weight was read
    _held: tuple[Any, Tensor] | None

    # Python properties: those of torch.Tensor would pass __torch_function__, which takes ten times as long.
    shape = property(lambda self: self._spec[0])
    dtype = property(lambda self: self._spec[1])
    device = property(lambda self: self._spec[2])
    requires_grad = property(lambda self: self._trains, lambda self, value: raise_read_only())
    grad = property(lambda self: None, lambda self, value: raise_read_only())
    data = property(lambda self: self.detach(), lambda self, value: raise_read_only())
    is_leaf = property(lambda self: False)  # no optimizer takes it for a parameter

    def detach(self) -> Tensor:
        """The same weight without a gradient, computed no earlier and read-only too."""
        return _make(self._spec, False, self._source, self._disabled)

    def _compute(self) -> Tensor:
        """The weight as a plain tensor, with a gradient where it has one."""
        view = isinstance(self._source, Tensor)
        if not view:
            self._source.was_read = True
        weight = self._source if view else self._source.computed_weight(disabled=self._disabled)
        return weight if self._trains else weight.detach()

    def _value(self) -> Tensor:
        """The weight without a gradient, held for the next use and for pointers into it.

        A kernel reads through a pointer after the call that gave it. And code that takes one weight for chunk after
        chunk of an input, without gradients, as an autograd function does, pays for one product.
        """
        layer = None if isinstance(self._source, Tensor) else self._source
        parts = () if layer is None else (*layer._parameters.values(), *layer._buffers.values())
        versions = [(id(part), part._version) for part in parts if part is not None and not part.is_inference()]
        state = (torch.is_inference_mode_enabled(), optimizer_steps(), versions)
        if self._held is None or self._held[0] != state:
            with torch.no_grad():
                self._held = state, self._compute()
        return self._held[1]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # one that was read outside of what is compiled
            torch._dynamo.graph_break(msg=_TRACED)
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        _check_reads_only(func, args, kwargs)
        computed: dict[int, Tensor] = {}
        lasting = not torch.is_grad_enabled() or func in _POINTERS

        def compute(weight: LazyWeight) -> Tensor:
            if id(weight) not in computed:
                computed[id(weight)] = weight._value() if lasting else weight._compute()
            return computed[id(weight)]

        args, kwargs = tree_map_only(LazyWeight, compute, (args, kwargs))
        memory = {_memory(tensor) for tensor in computed.values()} - {0}
        result = func(*args, **kwargs)
        return tree_map_only(Tensor, lambda value: _read_only(value) if _memory(value) in memory else value, result)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Reached only where __torch_function__ is switched off, as below an autograd function of C++.
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            if argument.is_write and any(isinstance(leaf, LazyWeight) for leaf in tree_leaves(value)):
                raise_read_only()
        args, kwargs = tree_map_only(LazyWeight, lambda weight: weight._value(), (args, kwargs))
        return func(*args, **kwargs)


class _FromFactors(torch.autograd.Function):
    """A LazyWeight as a function of the factors: autograd functions that take it as an input pass a gradient back."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor, layer: Any, spec: Spec) -> Tensor:
        ctx.factors, ctx.layer = (A, B), layer
        return _make(spec, True, layer, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (A, B), layer = ctx.factors, ctx.layer
        G = layer.scaling * layer.as_matrix(grads[0]).to(A.dtype)
        needs_A, needs_B, *_ = ctx.needs_input_grad
        return B.mT @ G if needs_A else None, G @ A.mT if needs_B else None, None, None


class _FromTensor(torch.autograd.Function):
    """A LazyWeight that stands for a view of another one."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _make((tensor.shape, tensor.dtype, tensor.device), True, tensor, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


# The C++ method itself: what torch.autograd.Function.apply does around it takes longer than all the rest here.
_from_factors = super(torch.autograd.Function, _FromFactors).apply


def make_lazy_weight(layer: Any, A: Tensor, B: Tensor, spec: Spec, *, disabled: bool, trains: bool) -> Tensor:
    """``layer.computed_weight(disabled=disabled)`` as a :class:`LazyWeight`.

    Args:
        layer: a :class:`ipca.nn.WindowLayer`, whose weight is ``… + scaling · B A``.
        A, B: its factors ``(…, rank, in)``, ``(…, out, rank)``.
        spec: the weight's shape, dtype and device.
        disabled: whether it is the pretrained weight.
        trains: whether a gradient goes to a factor.
    """
    if trains and torch.is_grad_enabled():
        return _from_factors(A, B, layer, spec)
    return _make(spec, trains, layer, disabled)


def _make(spec: Spec, trains: bool, source: Any, disabled: bool) -> Tensor:
    weight: LazyWeight = Tensor._make_wrapper_subclass(LazyWeight, spec[0], dtype=spec[1], device=spec[2])
    weight._spec, weight._trains, weight._source, weight._disabled, weight._held = spec, trains, source, disabled, None
    return weight


def _read_only(tensor: Tensor) -> Tensor:
    """``tensor``, which shares memory with a computed weight, as a LazyWeight."""
    if tensor.requires_grad and torch.is_grad_enabled():
        return _FromTensor.apply(tensor)
    return _make((tensor.shape, tensor.dtype, tensor.device), tensor.requires_grad, tensor, False)


def _check_reads_only(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise RuntimeError where a call would write into a LazyWeight, or wait for its gradient."""
    name = getattr(func, "__name__", "")
    if name in _HOOKS:
        raise RuntimeError(_NO_HOOKS)
    written = [kwargs.get("out")]
    if name in _WRITES or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace") is True:
        written += [args[:1], *(kwargs.get(word) for word in ("input", "self", "tensor"))]
    if any(isinstance(leaf, LazyWeight) for leaf in tree_leaves(written)):
        raise_read_only()


def _memory(tensor: Tensor) -> int:
    """The address of the memory of ``tensor``; 0 where it has none, as on the meta device or within ``vmap``."""
    owns = type(tensor) is Tensor and not tensor.is_meta and torch._C._has_storage(tensor)
    return tensor.untyped_storage().data_ptr() if owns else 0


def raise_read_only() -> NoReturn:
    """Raise the RuntimeError of a write into a layer's weight."""
    raise RuntimeError(_READ_ONLY)
