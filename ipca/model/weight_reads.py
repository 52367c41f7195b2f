"""Layers whose weight the model's code reads instead of calling the layer, found in the source before the model runs.

What adds a low-rank path to a layer's output, as PEFT and servers do, has no part in such a layer. Once a model has
run, its adapted layers know (:attr:`ipca.nn.WindowLayer.bypassed`); this is for the time before.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Collection, Iterator
from types import CodeType
from typing import Any, NamedTuple

from torch import nn

_NO_VALUE = {"device", "dim", "dtype", "is_cuda", "ndim", "numel", "requires_grad", "shape", "size"}
"""What code asks of a weight without computing with it."""


class WeightReads(NamedTuple):
    """Layers whose weight a ``forward`` computes with: those that no code calls, and those that other code calls."""

    uncalled: list[str]
    also_called: list[str]


class _Path(NamedTuple):
    """``self.a.b`` in code, without ``self``; ``end`` is what follows ``self.a.weight``: ``"T"`` or ``""``."""

    name: str
    end: str
    is_called: bool


def weight_reads(model: nn.Module, names: Collection[str]) -> WeightReads:
    """Those of the layers ``names`` whose weight is read, in their order. Code without a source is not searched.

    A layer that a ``forward`` passes on or puts into a variable counts as called.
    """
    classes: list[tuple[str, Any]] = [(path, type(module)) for path, module in model.named_modules()]
    read = {_join(path, name) for path, cls in classes for name in _read(cls)}
    found = [name for name in names if name in read]
    words = frozenset(name.rpartition(".")[2] for name in found)
    called = {_join(path, name) for path, cls in classes for name in _called(cls, words)} if found else ()
    return WeightReads([n for n in found if n not in called], [n for n in found if n in called])


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


@functools.cache
def _read(cls: Any) -> frozenset[str]:
    """The submodules of whose weight ``forward`` computes something."""
    methods = _methods(cls)
    paths = [p for name in _reached(cls) if "weight" in _words(methods[name].__code__) for p in _paths(methods[name])]
    reads = [path for path in paths if path.name.endswith(".weight") and path.end not in _NO_VALUE]
    return frozenset(path.name.removesuffix(".weight") for path in reads)


@functools.cache
def _called(cls: Any, words: frozenset[str]) -> frozenset[str]:
    """The submodules that are called, or passed on by ``forward``, of those whose name ends with one of ``words``."""
    methods, reached = _methods(cls), _reached(cls)
    return frozenset(
        path.name
        for name, method in methods.items()
        if words.intersection(_words(method.__code__))
        for path in _paths(method)
        if path.is_called or name in reached
    )


@functools.cache
def _methods(cls: Any) -> dict[str, Any]:
    if cls.__module__.startswith("torch."):
        return {}
    found = {name: inspect.unwrap(method) for name, method in inspect.getmembers(cls, inspect.isfunction)}
    return {name: method for name, method in found.items() if inspect.isfunction(method)}


@functools.cache
def _reached(cls: Any) -> frozenset[str]:
    """``forward`` and the methods that it names, and those that these name, and so on."""
    methods = _methods(cls)
    found: set[str] = set()
    todo = {"forward"}.intersection(methods)
    while todo:
        found |= todo
        todo = {word for name in todo for word in _words(methods[name].__code__) if word in methods} - found
    return frozenset(found)


@functools.cache
def _words(code: CodeType) -> frozenset[str]:
    """The attributes and globals that stand in ``code``."""
    inner = [_words(const) for const in code.co_consts if isinstance(const, CodeType)]
    return frozenset(code.co_names).union(*inner)


@functools.cache
def _paths(method: Any) -> tuple[_Path, ...]:
    """What a method reads of ``self``, but for what it only compares with a type."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return ()
    return tuple(_find(tree))


def _find(tree: ast.AST) -> Iterator[_Path]:
    nodes = list(ast.walk(tree))
    ends = {id(node.value): node.attr for node in nodes if isinstance(node, ast.Attribute)}
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    functions = {id(call.func) for call in calls}
    typed = {id(call.args[0]) for call in calls if isinstance(call.func, ast.Name) and call.func.id == "isinstance"}
    for node in nodes:
        if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load) or id(node) in typed:
            continue
        end = ends.get(id(node), "")
        if end and node.attr != "weight":
            continue
        parts, value = [node.attr], node.value
        while isinstance(value, ast.Attribute):
            parts.append(value.attr)
            value = value.value
        if isinstance(value, ast.Name) and value.id == "self":
            yield _Path(".".join(reversed(parts)), end, id(node) in functions)
