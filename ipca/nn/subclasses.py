"""Subclasses of plain layers that compute the same: recognized by their source, and rebuilt."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

_MATTERS = {
    *("weight", "bias", "state_dict", "load_state_dict", "get_extra_state", "set_extra_state", "_apply"),
    *("__call__", "_call_impl", "__getattr__", "__getattribute__", "_save_to_state_dict", "_load_from_state_dict"),
    "_conv_forward",
}
"""What a subclass must not override, beside ``forward``."""
_SCALED = (
    "return super().forward(input_ids) * self.embed_scale",
    "return super().forward(input_ids) * self.embed_scale.to(self.weight.dtype)",
)
"""Forwards of BART, M2M100, XGLM and of Gemma: embeddings times a constant."""
_LINEAR = """\
hidden_states = input @ self.weight.T
if self.bias is None:
    return hidden_states
return hidden_states + self.bias"""
"""The forward of Falcon's linear layer."""
_FORWARDS: dict[type[nn.Module], tuple[str, ...]] = {nn.Linear: (_LINEAR,), nn.Embedding: _SCALED}

Subclass = tuple[type[nn.Module], dict[str, Any]]
"""A class, and the attributes that an instance has beside those of the plain layer."""


def computes_as(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether ``module`` is a ``base``, or of a subclass that computes ``base``'s function, times ``embed_scale``.

    A subclass does where it overrides nothing that matters, or only ``forward``, by one whose source is known.
    """
    cls = type(module)
    if cls is base:
        return True
    if not isinstance(module, base) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    own = [vars(each) for each in cls.__mro__[: cls.__mro__.index(base)]]
    held = {*module._parameters, *module._buffers, *module._modules}
    if any(_MATTERS & each.keys() for each in own) or held - {"weight", "bias", "embed_scale"}:
        return False
    forwards = [each["forward"] for each in own if "forward" in each]
    if not forwards:
        return not hasattr(module, "embed_scale")  # PEFT would multiply by it
    known = len(forwards) == 1 and _body(forwards[0]) in _FORWARDS.get(base, ())
    return known and (base is nn.Linear or _is_scalar(module.embed_scale))


def subclass_of(module: nn.Module, base: type[nn.Module]) -> Subclass | None:
    """What :func:`restore` needs to rebuild a subclass of ``base``; None for ``base`` itself."""
    if type(module) is base:
        return None
    usual = vars(base(1, 1, device="meta"))
    return type(module), {name: value for name, value in vars(module).items() if name not in usual}


def restore(plain: nn.Module, subclass: Subclass | None) -> nn.Module:
    """``plain``, a new layer of the base class, as an instance of the subclass that :func:`subclass_of` found."""
    if subclass is not None:
        plain.__class__, attributes = subclass
        plain.__dict__.update(attributes)
    return plain


def _is_scalar(scale: Any) -> bool:
    return scale.numel() == 1 if isinstance(scale, Tensor) else isinstance(scale, (int, float))


@lru_cache
def _body(function: Callable[..., Any]) -> str:
    """The statements of a function without its docstring, in one spelling; empty where there is no source."""
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return ""
    assert isinstance(definition, ast.FunctionDef)
    body = definition.body[1:] if ast.get_docstring(definition) is not None else definition.body
    return "\n".join(ast.unparse(statement) for statement in body)
