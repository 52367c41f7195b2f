"""Every refusal in the tests leaves its models as they were: ``pytest.raises`` compares the models at hand."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.models import snapshot

LARGEST = 300_000
"""Parameters above which a model is not compared, because every refusal would read all of them."""
count = 0
"""Models that were compared in this process."""
_raises = pytest.raises


class Raises:
    """``pytest.raises`` as a context, around which the models among the test's variables must not change."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._context = _raises(*args, **kwargs)

    def __enter__(self) -> Any:
        variables = sys._getframe(1).f_locals.items()
        self._before = [(name, model, state(model)) for name, model in variables if is_compared(model)]
        return self._context.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        global count
        expected = self._context.__exit__(*error)
        if isinstance(error[1], Exception):  # Ctrl-C waits until a change is whole
            for name, model, before in self._before:
                assert state(model) == before, f"a call was refused, and {name!r} has changed: {error[1]}"
            count += len(self._before)
        return expected


def raises(*args: Any, **kwargs: Any) -> Any:
    """``pytest.raises``, see :class:`Raises`; with a function to call it is the original."""
    return _raises(*args, **kwargs) if len(args) > 1 else Raises(*args, **kwargs)


def is_compared(value: Any) -> bool:
    """Whether ``value`` is a model of plain tensors, which accelerate does not exchange, and not too large."""
    if not isinstance(value, nn.Module) or any(hasattr(module, "_hf_hook") for module in value.modules()):
        return False
    tensors = [*value.parameters(), *value.buffers()]
    plain = all(type(t) in (torch.Tensor, nn.Parameter, nn.Buffer) and t.layout == torch.strided for t in tensors)
    return plain and sum(t.numel() for t in tensors) <= LARGEST


def state(model: nn.Module) -> tuple[Any, ...]:
    """Modules with their types, parameters and buffers: which stand where, and every bit of them."""
    return (*snapshot(model), [type(module) for module in model.modules()])
