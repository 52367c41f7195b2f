"""Checks of the values of a row, by the role of their column; an error says what was expected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ipca.train.sources import DataError, check_image, shortened

_SPEAKERS = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_FIELDS = {"role", "from", "content", "value"}
"""What is read of a message."""
_PLAIN: dict[str, tuple[Any, ...]] = {"weight": (None, 1), "tool_calls": (None, []), "function_call": (None,)}
"""Fields of OpenAI's answers that say what is trained on, and their values where that is the text and nothing else."""


def _check_text(value: Any, place: str, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}, column {column!r}: expected text, got {shortened(value)}.")
    return value


def _check_label(value: Any, place: str, column: str) -> str | int:
    if isinstance(value, bool):
        return int(value)
    if not isinstance(value, str | int) or not str(value).strip():
        raise DataError(
            f"{place}, column {column!r}: expected the name or the number of a class, got {shortened(value)}."
        )
    return value.strip() if isinstance(value, str) else value


def _check_tokens(value: Any, place: str, column: str) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(each, str) and each for each in value):
        raise DataError(f"{place}, column {column!r}: expected a list of words, got {shortened(value)}.")
    return value


def _check_tags(value: Any, place: str, column: str) -> list[str | int]:
    if not isinstance(value, list) or not all(isinstance(each, str | int) and str(each).strip() for each in value):
        raise DataError(f"{place}, column {column!r}: expected a list of names or numbers, got {shortened(value)}.")
    return [each.strip() if isinstance(each, str) else int(each) for each in value]


def _check_messages(value: Any, place: str, column: str) -> list[dict[str, str]]:
    """``[{"role": …, "content": …}, …]``, also of ShareGPT's ``from`` and ``value``; the last one is an answer."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}, column {column!r}: expected a list of messages, got {shortened(value)}.")
    messages = []
    for k, each in enumerate(value, start=1):
        role = each.get("role", each.get("from")) if isinstance(each, dict) else None
        content = each.get("content", each.get("value")) if isinstance(each, dict) else None
        if not isinstance(role, str) or role not in _SPEAKERS or not isinstance(content, str):
            raise DataError(
                f"{place}, column {column!r}, message {k}: expected role (system, user or assistant) and content, got "
                f"{shortened(each)}."
            )
        for name, plain in _PLAIN.items() if _SPEAKERS[role] == "assistant" else ():
            if each.get(name) not in plain:
                raise DataError(
                    f"{place}, column {column!r}, message {k}: expected an answer that is trained on as its text, got "
                    f"{name} {shortened(each[name])}; leave the field out, or the conversation."
                )
        if _SPEAKERS[role] == "assistant" and not content.strip():
            raise DataError(f"{place}, column {column!r}, message {k}: expected the text of an answer, got none.")
        messages.append({"role": _SPEAKERS[role], "content": content})
    if not any(each["role"] == "assistant" for each in messages):
        raise DataError(f"{place}, column {column!r}: expected a message of the assistant, got none.")
    return messages


def unread_fields(messages: Any) -> list[str]:
    """The names of what messages hold and nothing reads."""
    fields = [(name, value) for each in messages for name, value in each.items() if name not in _FIELDS]
    return [name for name, value in fields if value not in _PLAIN.get(name, (None,))]


def text_below(value: Any, place: str, column: str) -> str:
    """What an additional input adds to the end of a prompt.

    Raises:
        DataError: it is neither text nor nothing.
    """
    if value is not None and not isinstance(value, str):
        raise DataError(f"{place}, column {column!r}: expected text or nothing, got {shortened(value)}.")
    return f"\n\n{value}" if value and value.strip() else ""


def _check_image_value(value: Any, place: str, column: str) -> Any:
    """A path, the bytes of a file, or both as ``datasets`` keeps them: ``{"path": …, "bytes": …}``."""
    found = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
    if not isinstance(found, str | bytes) or not found:
        raise DataError(f"{place}, column {column!r}: expected an image, got {shortened(value)}.")
    if isinstance(found, bytes):
        check_image(found, f"{place}, column {column!r}")
    else:
        check_image(Path(found), f"{place}, column {column!r}, {found}")
    return value


ROW_CHECKS: dict[str, Callable[[Any, str, str], Any]] = {
    "text": _check_text,
    "prompt": _check_text,
    "completion": _check_text,
    "label": _check_label,
    "tokens": _check_tokens,
    "tags": _check_tags,
    "messages": _check_messages,
    "image": _check_image_value,
}
