"""Heads of transformers models, which train whole: task heads, and what ``from_pretrained`` has drawn at random.

A task head is everything outside ``base_model`` of a ``…For…Classification``, ``…QuestionAnswering`` or
``…MultipleChoice`` model: ``classifier``, ``score``, ``qa_outputs``, or both ``pre_classifier`` and
``classifier``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ipca.model.patterns import matches, matches_any
from ipca.nn.window_layer import WindowLayer

_TASKS = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice)")
_NAMES = ("classifier", "fc", "head", "projector", "qa_outputs", "score")
"""Heads of models that are their own ``base_model``, as CLIP's and Whisper's."""
_LOADED = "_is_hf_initialized"
"""The attribute with which transformers marks the parameters that ``from_pretrained`` has read from a file."""


def find_heads(model: nn.Module, targets: str | Iterable[str] = "all-linear", exclude: Iterable[str] = ()) -> list[str]:
    """The paths of the modules that are the head of ``model``, outermost ones with parameters.

    Args:
        targets: ``"all-linear"``, a pattern or several. One that matches modules of the head only asks for a window
            there; the rest of the head is returned.
        exclude: patterns of modules to leave out.
    """
    heads = _heads(model)
    exclude, asked = tuple(exclude), _asked(model, heads, (targets,) if isinstance(targets, str) else tuple(targets))
    return [name for head in heads for name in _free(model, head, asked) if not matches_any(exclude, name)]


def warn_of_loose_parameters(model: nn.Module) -> None:
    """Warn of a head that consists of parameters of the model itself, as Tapas' does: no adapter file can hold it."""
    loose = [name for name, _ in model.named_parameters(recurse=False)] if _is_for_task(model) else []
    if loose:
        warnings.warn(
            f"{', '.join(loose)} of {type(model).__name__} stay frozen: an adapter file holds whole modules only. "
            "Where they are new and random, move them into a module, which then trains whole.",
            stacklevel=3,
        )


def _is_for_task(model: nn.Module) -> bool:
    named = any(_TASKS.search(cls.__name__) for cls in type(model).__mro__)
    return named and isinstance(getattr(model, "base_model", None), nn.Module)


def _heads(model: nn.Module) -> list[str]:
    """The modules that are the head of ``model``, and modules beside it or of its base that are new."""
    base = getattr(model, "base_model", None)
    if not isinstance(base, nn.Module):
        return []
    outside = [
        name for name, child in model.named_children() if (name in _NAMES if base is model else child is not base)
    ]
    if not any(getattr(parameter, _LOADED, False) for parameter in base.parameters()):
        return outside if _is_for_task(model) else []
    embeddings = find_embeddings(model)  # a resized vocabulary is not new
    new = [n for name in outside if model.get_submodule(name) not in embeddings for n in _new(model, name)]
    prefix = "" if base is model else f"{model.base_model_prefix}."
    for name, child in base.named_children():  # such as a pooler
        if f"{prefix}{name}" not in outside and child not in embeddings:
            new += [n for n in _new(model, f"{prefix}{name}") if n == f"{prefix}{name}"]
    return [*outside, *(name for name in new if name not in outside)] if _is_for_task(model) else new


def find_embeddings(model: nn.Module) -> list[nn.Module]:
    """The modules by which a transformers model reads tokens in and writes them out."""
    found: list[Any] = []
    for which in ("input", "output"):
        try:
            found.append(getattr(model, f"get_{which}_embeddings")())
        except (AttributeError, NotImplementedError):
            continue
    return [module for module in found if isinstance(module, nn.Module)]


def _new(model: nn.Module, name: str) -> list[str]:
    """The outermost modules within ``name`` of which no parameter was loaded."""
    module = model.get_submodule(name)
    parameters = list(module.parameters())
    if not any(getattr(parameter, _LOADED, False) for parameter in parameters):
        return [name] if parameters and all(p.is_floating_point() for p in parameters) else []
    return [new for child, _ in module.named_children() for new in _new(model, f"{name}.{child}")]


def _asked(model: nn.Module, heads: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The modules of ``heads`` that a pattern names which names nothing else."""
    inside = tuple(f"{head}." for head in heads)
    asked = []
    for pattern in patterns:
        named = [name for name, _ in model.named_modules() if name and matches(pattern, name)] if heads else []
        if all(f"{name}.".startswith(inside) for name in named):
            asked += named
    return asked


def _free(model: nn.Module, name: str, asked: Sequence[str]) -> list[str]:
    """The module ``name``, or what remains of it beside modules that are ``asked`` for or adapted already."""
    module = model.get_submodule(name)
    if name in asked or isinstance(module, WindowLayer) or next(module.parameters(), None) is None:
        return []
    taken = any(path.startswith(f"{name}.") for path in asked)
    if not taken and not any(isinstance(inner, WindowLayer) for inner in module.modules()):
        return [name]
    return [free for child, _ in module.named_children() for free in _free(model, f"{name}.{child}", asked)]
