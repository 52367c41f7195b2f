"""A vocabulary that was resized after its base was saved, whose rows an adapter file does not hold."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from ipca.model.heads import find_embeddings


def warn_of_vocabulary(
    model: nn.Module, saved: Iterable[str] = (), base_model: str | None = None, *, stacklevel: int = 3
) -> None:
    """Warn where ``model`` has another number of tokens than the base that its adapter is for.

    Args:
        saved: paths of modules that are saved with all that is in them.
        base_model: folder or name of the base; default ``model.name_or_path``. One that is not on this disk is not
            compared.
    """
    base, here = base_model or getattr(model, "name_or_path", None), vocab_size(model)
    lost = _embeddings(model, saved)
    there = _stored_tokens(model, base) if here and lost and base else None
    if there and there != here:
        warnings.warn(
            f"{', '.join(lost)}: this vocabulary has {here} tokens and that of {base!r} {there}, and the adapter does "
            "not hold the rows that differ, so that what loads will not be what was trained. Save the resized base "
            "with save_pretrained, load it from there and adapt that, or name these modules in modules_to_save; "
            "save_pretrained of an adapted model writes all of it.",
            RuntimeWarning,
            stacklevel=stacklevel,
        )


def warn_of_other_vocabulary(
    model: nn.Module, trained: int | None, saved: Iterable[str] = (), *, stacklevel: int = 3
) -> None:
    """Warn where ``model`` has another number of tokens than the model whose adapter it gets, which had ``trained``.

    Args:
        saved: as for :func:`warn_of_vocabulary`.
    """
    here, names = vocab_size(model), _embeddings(model, saved)
    if trained and here and names and here != trained:
        warnings.warn(
            f"{', '.join(names)}: this vocabulary has {here} tokens, and the adapter was trained with {trained}, of "
            "which it does not hold the rows; load it onto the model that it was trained on.",
            RuntimeWarning,
            stacklevel=stacklevel,
        )


def vocab_size(model: Any) -> int | None:
    """The size of the vocabulary by the configuration of a model of transformers; None where there is none."""
    return _tokens(getattr(model, "config", None))


def _embeddings(model: nn.Module, saved: Iterable[str]) -> list[str]:
    """The paths of the embeddings and the language head of ``model`` that are not in the modules ``saved``."""
    within, modules = tuple(f"{name}." for name in saved), find_embeddings(model)
    names = [name for name, module in model.named_modules() if any(module is each for each in modules)]
    return [name for name in names if not f"{name}.".startswith(within)]


def _tokens(config: Any) -> int | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) else None


def _stored_tokens(model: Any, base: str) -> int | None:
    """The size of the vocabulary of ``base``, in a folder or the Hub's local cache; None where it is not known."""
    try:
        return _tokens(type(model.config).from_pretrained(base, local_files_only=True))
    except (OSError, ValueError):  # not on this disk, or no configuration
        return None
