"""PCConfig: what to adapt in a model and how, as one frozen record that JSON holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

from ipca.nn import check_options
from ipca.svd.decompose import tolerance
from ipca.window import Window, as_window


@dataclass(frozen=True)
class PCConfig:
    """What :func:`ipca.apply_pc` does to a model.

    A *pattern* is a module path (``"encoder.layer.0.intermediate.dense"``), the end of one (``"intermediate.dense"``),
    or a regular expression that matches a whole path (``r"encoder\\.layer\\.[0-3]\\..*dense"``). A stack of experts'
    weights has the path of its parameter (``"mlp.experts.down_proj"``).

    Attributes:
        rank: components a layer trains.
        window: where the window starts, in the text form of :class:`ipca.Window`.
        alpha: ``scaling · rank``; None means ``rank``, so that scaling is 1.
        form: ``"residual"`` or ``"intact"``, see :class:`ipca.nn.LinearPC`.
        dropout: of the low-rank branch's input.
        targets: ``"all-linear"`` (every linear layer but the output head), a pattern, or several, of embeddings,
            convolutions and experts too.
        exclude: patterns of modules to leave alone.
        modules_to_save: patterns of modules that are fully trained and saved in the adapter file, such as a new head.
        rank_pattern, window_pattern, alpha_pattern: exceptions, ``{pattern: value}``; the first match counts.
        adapter_dtype: of the factors, such as ``"float32"``; None means the weight's, float32 for 16-bit weights.
        tol: of the decomposition, see :func:`ipca.window_svd`.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of range; the message names it.
    """

    rank: int = 16
    window: str = "middle"
    alpha: float | None = None
    form: str = "residual"
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    exclude: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    window_pattern: Mapping[str, str] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    adapter_dtype: str | None = None
    tol: float | str = "default"

    def __post_init__(self) -> None:
        set_field = partial(object.__setattr__, self)
        set_field("window", as_window(self.window, self.rank).text)
        set_field("targets", self.targets if isinstance(self.targets, str) else _texts("targets", self.targets))
        for name in ("exclude", "modules_to_save"):
            set_field(name, _texts(name, getattr(self, name)))
        for name in ("rank_pattern", "window_pattern", "alpha_pattern"):
            set_field(name, _mapping(name, getattr(self, name)))
        set_field("window_pattern", {k: as_window(v, None).text for k, v in self.window_pattern.items()})
        for rank in self.rank_pattern.values():
            Window(self.window, rank)
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            alpha = self.rank if alpha is None else alpha
            check_options(form=self.form, dropout=_number("dropout", self.dropout), alpha=_number("alpha", alpha))
        if self.adapter_dtype not in (None, "float16", "bfloat16", "float32", "float64"):
            raise ValueError(f"adapter_dtype must name a float dtype such as 'float32'; got {self.adapter_dtype!r}.")
        tolerance(self.tol)

    @classmethod
    def create(cls, *, window: Window | str | float = "middle", rank: int | None = None, **options: Any) -> PCConfig:
        """A config from what users write: ``window`` may be a :class:`ipca.Window`, with its own rank.

        Raises:
            TypeError: an option that does not exist, with the names that do.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise TypeError(f"unknown option {', '.join(unknown)}; PCConfig has {', '.join(sorted(known))}.")
        chosen = as_window(window, rank)
        return cls(rank=chosen.rank, window=chosen.text, **options)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> PCConfig:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: not a JSON object, or an unknown key.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a PCConfig in JSON: {error}.") from None
        if not isinstance(values, dict):
            raise ValueError(f"a PCConfig in JSON is an object, got {type(values).__name__}.")
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown keys in PCConfig: {', '.join(unknown)}.")
        return cls(**values)


def _texts(name: str, values: Any) -> tuple[str, ...]:
    values = (values,) if isinstance(values, str) else values
    if not isinstance(values, Iterable) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"{name} must be strings, got {values!r}.")
    return tuple(values)


def _mapping(name: str, values: Any) -> dict[str, Any]:
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise TypeError(f"{name} must be a dictionary of patterns, got {values!r}.")
    return dict(values)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    return value
