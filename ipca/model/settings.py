"""AdapterSettings: which layers are adapted and how, as one validated record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from ipca.nn.initialization import check_options, default_adapter_dtype
from ipca.svd.decompose import tolerance
from ipca.window import Window, as_pattern_window, as_window

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_PEFT_FIELDS = ("base_model_name_or_path", "is_prompt_learning", "peft_type")
"""Attributes that PEFT's functions read first of a configuration."""


@dataclass(frozen=True, init=False)
class AdapterSettings:
    """The arguments of :func:`ipca.apply_pc` that say which layers are adapted and how, for code that passes them on.

    Sweeps, baselines and continual learners take such a record: ``AdapterSettings(rank=8, targets=["query"])``.

    A *pattern* is a module path (``"encoder.layer.0.intermediate.dense"``), the end of one (``"intermediate.dense"``),
    or a regular expression that matches a whole path (``r"encoder\\.layer\\.[0-3]\\..*dense"``). A stack of experts'
    weights has the path of its parameter (``"mlp.experts.down_proj"``).

    Attributes:
        rank: components a layer trains; 16 by default, or that of ``window``.
        window: where the window starts, stored in the text form of :class:`ipca.Window`.
        alpha: ``scaling · rank``; None means ``rank``, so that scaling is 1.
        form: ``"intact"`` or ``"residual"``, see :class:`ipca.nn.LinearPC`.
        dropout: of the low-rank branch's input.
        targets: ``"all-linear"`` (every linear layer but heads), a pattern, or several, of embeddings, convolutions and
            experts too.
        exclude: patterns of modules that are not adapted, and of heads that stay frozen.
        modules_to_save: patterns of more modules that are fully trained and saved in the adapter file. The head of a
            transformers model for classification, question answering or multiple choice is, without being named.
        rank_pattern, window_pattern, alpha_pattern: exceptions, ``{pattern: value}``; the first match counts.
        adapter_dtype: of the factors, such as ``"float32"``; None means the weight's, float32 for 16-bit weights.
        tol: of the decomposition, see :func:`ipca.window_svd`.
        train, magnitude: which factors train, and the size they start at, see :class:`ipca.nn.LinearPC`.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of range; the message names it.
    """

    rank: int
    window: str
    alpha: float | None
    form: str
    dropout: float
    targets: str | tuple[str, ...]
    exclude: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    window_pattern: Mapping[str, str]
    alpha_pattern: Mapping[str, float]
    adapter_dtype: str | None
    tol: float | str
    train: str
    magnitude: float | str

    def __init__(
        self,
        rank: int | None = None,
        window: Window | str | float = "middle",
        alpha: float | None = None,
        form: str = "intact",
        dropout: float = 0.0,
        targets: str | Iterable[str] = "all-linear",
        exclude: str | Iterable[str] = (),
        modules_to_save: str | Iterable[str] = (),
        rank_pattern: Mapping[str, int] = MappingProxyType({}),
        window_pattern: Mapping[str, Window | str | float] = MappingProxyType({}),
        alpha_pattern: Mapping[str, float] = MappingProxyType({}),
        adapter_dtype: torch.dtype | str | None = None,
        tol: float | str = "default",
        train: str = "both",
        magnitude: float | str = "sigma",
    ) -> None:
        chosen = as_window(window, rank)
        ranks, alphas = _mapping("rank_pattern", rank_pattern), _mapping("alpha_pattern", alpha_pattern)
        windows = {
            pattern: as_pattern_window(pattern, value, ranks.get(pattern, chosen.rank), "rank")
            for pattern, value in _mapping("window_pattern", window_pattern).items()
        }
        for exception in ranks.values():
            Window(chosen.start, exception)
        for value in (chosen.rank if alpha is None else alpha, *alphas.values()):
            numbers = {"dropout": _number("dropout", dropout), "alpha": _number("alpha", value)}
            check_options(form=form, train=train, magnitude=magnitude, **numbers)
        if isinstance(adapter_dtype, torch.dtype):
            adapter_dtype = str(adapter_dtype).removeprefix("torch.")
        if adapter_dtype not in (None, *_FLOATS):
            raise ValueError(f"adapter_dtype must name a float dtype such as 'float32'; got {adapter_dtype!r}.")
        tolerance(tol)
        values = (chosen.rank, chosen.text, alpha, form, dropout)
        patterns = (
            targets if isinstance(targets, str) else _texts("targets", targets),
            _texts("exclude", exclude),
            _texts("modules_to_save", modules_to_save),
        )
        stored = (*values, *patterns, ranks, windows, alphas, adapter_dtype, tol, train, magnitude)
        for field, value in zip(fields(self), stored, strict=True):
            object.__setattr__(self, field.name, value)

    def factor_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        """The dtype of the factors beside a weight of ``weight_dtype``."""
        if self.adapter_dtype is None:
            return default_adapter_dtype(weight_dtype)
        dtype: torch.dtype = getattr(torch, self.adapter_dtype)
        return dtype

    if not TYPE_CHECKING:  # a type checker would take every name for an attribute

        def __getattr__(self, name: str) -> Any:
            hint = "; for PEFT use an ipca.peft.PCConfig" if name in _PEFT_FIELDS else ""
            raise AttributeError(f"AdapterSettings has no attribute {name!r}{hint}.")


def _texts(name: str, values: Any) -> tuple[str, ...]:
    values = (values,) if isinstance(values, str) else values
    if not isinstance(values, Iterable):
        raise TypeError(f"{name} must be strings, got {values!r}.")
    texts = tuple(values)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be strings, got {values!r}.")
    return texts


def _mapping(name: str, values: Any) -> dict[str, Any]:
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise TypeError(f"{name} must be a dictionary of patterns, got {values!r}.")
    return dict(values)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    return value
