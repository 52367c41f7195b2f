"""Names of a model's classes, as transformers keeps them in the configuration, beside an adapter's head."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from ipca.model.targets import few


def class_names(config: Any) -> tuple[str, ...]:
    """The names of the classes in a configuration of transformers, by index; empty where it has LABEL_0, LABEL_1, …"""
    known = getattr(config, "id2label", None)
    if not isinstance(known, dict) or known.keys() != set(range(len(known))):
        return ()
    names = tuple(str(known[k]) for k in range(len(known)))
    return () if are_placeholders(names) else names


def are_placeholders(names: Sequence[str]) -> bool:
    """Whether transformers made up these names of classes."""
    return list(names) == [f"LABEL_{k}" for k in range(len(names))]


def name_classes(model: Any, labels: Sequence[str], *, stacklevel: int) -> None:
    """Have the configuration of ``model`` call its outputs by ``labels``, those of the adapter whose head it gets.

    Warns:
        RuntimeWarning: it had other names before.
    """
    config = getattr(model, "config", None)
    if not labels or len(getattr(config, "id2label", None) or ()) != len(labels):
        return
    here = class_names(config)
    if here and [name.casefold() for name in here] != [name.casefold() for name in labels]:
        words = f"model.config.id2label had {few([*here])}, and has the classes of the adapter now: {few([*labels])}."
        warnings.warn(words, RuntimeWarning, stacklevel=stacklevel + 1)
    config.id2label = dict(enumerate(labels))  # type: ignore[union-attr]
    config.label2id = {name: k for k, name in enumerate(labels)}  # type: ignore[union-attr]
