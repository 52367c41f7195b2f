"""Data of a run: find the files, check every row, and tell task and columns, before any model is loaded."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_KINDS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_KINDS |= {".txt": "text", ".md": "text"}
_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_NAMES = {
    "messages": ("messages", "conversations", "conversation", "chat"),
    "prompt": ("prompt", "instruction", "question"),
    "completion": ("completion", "output", "response", "answer"),
    "tokens": ("tokens", "words"),
    "tags": ("tags", "ner_tags", "pos_tags", "labels"),
    "image": ("image", "img", "picture"),
    "text": ("text", "sentence", "content", "document", "body", "review"),
    "label": ("label", "labels", "category", "class", "target", "sentiment"),
}
"""The columns that each role is found by."""
_ROLES = {
    "causal-lm": (("messages",), ("prompt", "completion"), ("text",)),
    "sequence-classification": (("text", "label"),),
    "token-classification": (("tokens", "tags"),),
    "image-classification": (("image", "label"),),
}
_GUESSES = (
    ("image-classification", ("image", "label")),
    ("token-classification", ("tokens", "tags")),
    ("causal-lm", ("messages",)),
    ("causal-lm", ("prompt", "completion")),
    ("sequence-classification", ("text", "label")),
    ("causal-lm", ("text",)),
)
"""What a data set is for, by the roles that its columns have; the first that fits."""
_SPEAKERS = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        name: as the user gave it.
        kind: ``json``, ``csv``, ``parquet``, ``text``, ``images``, or ``hub``.
        files: of this kind, sorted; empty for the Hub.
    """

    name: str
    kind: str
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Layout:
    """The task, and the name of the column that has each role.

    Attributes:
        input: column of Alpaca's additional ``input``, which is put below the prompt.
    """

    task: str
    columns: dict[str, str]
    input: str | None = None


@dataclass(frozen=True)
class Data:
    """Checked data.

    Attributes:
        layout: the task and the columns.
        rows: a ``datasets.Dataset`` with columns named by their roles; of text files one row a file.
        held_out: the same, where the source itself separates it.
        labels: names of the classes or tags, in order; empty for language models.
        whole: the rows are whole files of running text.
    """

    layout: Layout
    rows: Any
    held_out: Any | None
    labels: tuple[str, ...]
    whole: bool


class DataError(ValueError):
    """A row is not what the task needs; the message names file, line and column, and what was expected."""


def find_source(name: str) -> Source:
    """Files by their endings, or an id on the Hub.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a format that is not known, or a folder of several formats.
    """
    path = Path(name)
    if path.is_file():
        return Source(name, _kind(path), (path,))
    if not path.is_dir():
        if path.suffix or not _HUB_ID.fullmatch(name):
            raise FileNotFoundError(f"there is no file {name}.")
        return Source(name, "hub")
    files = sorted(each for each in path.rglob("*") if each.is_file() and not each.name.startswith("."))
    if any(each.suffix.lower() in _IMAGES for each in files):
        return Source(name, "images", tuple(each for each in files if each.suffix.lower() in _IMAGES))
    known = [each for each in files if each.suffix.lower() in _KINDS]
    kinds = sorted({_KINDS[each.suffix.lower()] for each in known})
    if len(kinds) != 1:
        what = f"holds {' and '.join(kinds)} files; give one kind" if kinds else "holds no file of a known format"
        raise ValueError(f"{name} {what}. Known are {', '.join(_KINDS)} and folders of images.")
    return Source(name, kinds[0], tuple(known))


def read_data(
    source: Source, task: str | None = None, columns: Mapping[str, str] | None = None, *, labels: Iterable[str] = ()
) -> Data:
    """All rows of ``source``, checked.

    Args:
        task: one of :data:`ipca.train.settings.TASKS`; default: what the columns say.
        columns: names by role, for those that cannot be found by their names.
        labels: the classes, where they are known already; a row with another one is an error.

    Raises:
        DataError: a row is not what the task needs.
        ImportError: ``datasets`` is missing.
        FileNotFoundError, ValueError: nothing to read, or columns that fit no task.
    """
    if source.kind == "images":
        return _read_images(source, task, tuple(labels))
    if source.kind == "text":
        return _read_text(source, task)
    sets = _load(source)
    train = sets["train"]
    layout = find_layout(train.column_names, task, columns or {}, source.name)
    given = tuple(labels) or _declared_labels(train, layout)
    found = {name: _converted(name, each, source, layout, given) for name, each in sets.items()}
    classes = given or _classes(layout, found["train"])
    return Data(
        layout,
        _numbered(found["train"], layout, classes),
        _numbered(found["held_out"], layout, classes) if "held_out" in found else None,
        classes,
        whole=False,
    )


def find_layout(names: Iterable[str], task: str | None, columns: Mapping[str, str], source: str) -> Layout:
    """What data with columns of these ``names`` is for.

    Raises:
        ValueError: they fit no task, or a named column is not there.
    """
    names = list(names)
    for role, column in columns.items():
        if role not in _NAMES:
            raise ValueError(f"columns have no role {role!r}; roles are {', '.join(_NAMES)}.")
        if column not in names:
            raise ValueError(f"{source} has no column {column!r}; it has {', '.join(names)}.")
    lower = {name.lower(): name for name in names}
    found = {role: lower[each] for role, known in _NAMES.items() for each in reversed(known) if each in lower}
    found |= columns
    wanted = [(task, roles) for roles in _ROLES[task]] if task else list(_GUESSES)
    for kind, roles in wanted:
        if set(roles) <= set(found) and len({found[role] for role in roles}) == len(roles):
            extra = lower.get("input") if roles == ("prompt", "completion") else None
            return Layout(kind, {role: found[role] for role in roles}, extra if extra not in found.values() else None)
    needed = " or ".join(" + ".join(roles) for _, roles in wanted)
    shown = wanted[0][1] if task else ("prompt", "completion") if len(names) > 1 else ("text",)
    example = " ".join(f"{role}={name}" for role, name in zip(shown, names or ["NAME"], strict=False))
    raise ValueError(
        f"{source} has the columns {', '.join(names)}; "
        + (f"the task {task} needs" if task else "a task needs")
        + f" {needed}. Name them, such as --columns {example}."
    )


def _kind(path: Path) -> str:
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path} has an unknown format; known are {', '.join(_KINDS)} and folders of images.")
    return kind


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError("reading data needs datasets; run: pip install 'ipca-lora[train]'") from None
    datasets.disable_progress_bars()
    return datasets


def _load(source: Source) -> dict[str, Any]:
    """``train`` and, from the Hub, ``held_out``; JSON and CSV are read line by line, so that an error has its place."""
    datasets = _datasets()
    if source.kind in ("json", "csv"):
        placed = list(_placed_rows(source))
        if not placed:
            raise DataError(f"{source.name} holds no rows.")
        names = list(dict.fromkeys(name for _, row in placed for name in row))
        rows = [{name: row.get(name) for name in names} for _, row in placed]
        return {"train": _Placed(rows, [place for place, _ in placed], names)}
    if source.kind == "parquet":
        try:
            found = datasets.load_dataset("parquet", data_files=[str(path) for path in source.files], split="train")
        except Exception as error:
            raise DataError(f"{source.name} cannot be read as Parquet: {_words(error)}") from None
        return {"train": found}
    try:
        splits = datasets.load_dataset(source.name)
    except Exception as error:  # of the network, of the Hub, of a data set with several configurations
        raise FileNotFoundError(
            f"there is no file {source.name}, and no such data set on the Hub: {_words(error)}"
        ) from None
    train = splits["train"] if "train" in splits else splits[next(iter(splits))]
    other = next((splits[name] for name in ("validation", "test") if name in splits), None)
    return {"train": train} | ({} if other is None or other is train else {"held_out": other})


class _Placed:
    """Rows that know their places, in the way of a ``datasets.Dataset``."""

    def __init__(self, rows: list[Row], places: list[str], column_names: list[str]) -> None:
        self.rows, self.places, self.column_names = rows, places, column_names

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


def _placed_rows(source: Source) -> Iterator[tuple[str, Row]]:
    for path in source.files:
        if source.kind == "csv":
            yield from _csv_rows(path)
        else:
            yield from _json_rows(path)


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    text = _text(path)
    if text.lstrip()[:1] == "[":  # one array
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}") from None
        numbered = [(f"{path}, item {k}", row) for k, row in enumerate(rows, start=1)]
    else:
        numbered = []
        for k, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    numbered.append((f"{path}, line {k}", json.loads(line)))
                except ValueError as error:
                    raise DataError(
                        f"{path}, line {k}: expected one JSON object, got {_short(line)} ({error})"
                    ) from None
    for place, row in numbered:
        if not isinstance(row, dict):
            raise DataError(f"{place}: expected an object with named columns, got {_short(row)}.")
        if "\\u" in text and re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
            raise DataError(f"{place}: expected text in Unicode, got half of a surrogate pair, such as \\ud800.")
        yield place, row


def _csv_rows(path: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(1 << 30)
    lines = _text(path).split("\n")
    first_line = next((line for line in lines if line.strip()), "")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(first_line)
    reader = csv.reader((line + "\n" for line in lines), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        line = 1
        for values in reader:
            first, line = line, reader.line_num + 1
            if not values or values == [""]:
                continue
            if header is None:
                header = [name.strip() for name in values]
                if len(set(header)) < len(header):
                    raise DataError(f"{path}, line {first}: expected columns of different names, got {_short(values)}.")
                continue
            if len(values) != len(header):
                raise DataError(
                    f"{path}, line {first}: expected {len(header)} values ({', '.join(header)}), got {len(values)}; "
                    "put text that holds the separator between quotation marks."
                )
            yield f"{path}, line {first}", dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}.") from None


def _delimiter(header: str) -> str:
    return max(",;\t", key=header.count)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line}: expected text in UTF-8, got the byte 0x{error.object[error.start]:02x}."
        ) from None


def _read_text(source: Source, task: str | None) -> Data:
    if task not in (None, "causal-lm"):
        raise ValueError(f"{source.name} is running text, which is for the task causal-lm; {task} needs rows.")
    texts = [_text(path) for path in source.files]
    if not any(text.strip() for text in texts):
        raise DataError(f"{source.name} holds no text.")
    rows = _datasets().Dataset.from_dict({"text": [text for text in texts if text.strip()]})
    return Data(Layout("causal-lm", {"text": "text"}), rows, None, (), whole=True)


def _read_images(source: Source, task: str | None, known: tuple[str, ...]) -> Data:
    """Images in one folder a class, ``train/`` and ``test/`` around them or not."""
    if task not in (None, "image-classification"):
        raise ValueError(f"{source.name} holds images, which are for the task image-classification, not {task}.")
    root = Path(source.name)
    splits: dict[str, list[tuple[Path, str]]] = {}
    for path in source.files:
        *outer, label = path.parent.relative_to(root).parts or ("",)
        first = outer[0] if outer else ""
        splits.setdefault(first if first in ("train", "validation", "val", "test") else "train", []).append(
            (path, label)
        )
        if not label:
            raise DataError(
                f"{path}: expected an image in a folder named by its class, such as {root}/cat/{path.name}."
            )
    train = splits.get("train") or splits[min(splits)]
    other = next((splits[name] for name in ("validation", "val", "test") if splits.get(name, train) is not train), None)
    labels = known or tuple(sorted({label for _, label in train}))
    if len(labels) < 2:
        raise DataError(f"{source.name}: expected a folder for each class, at least two; got {', '.join(labels)}.")
    for path, label in (*train, *(other or ())):
        if label not in labels:
            raise DataError(f"{path}: the class {label!r} is not one of {', '.join(labels[:8])}.")
        check_image(path)
    made = [None if part is None else _image_set(part, labels) for part in (train, other)]
    return Data(Layout("image-classification", {"image": "image", "label": "label"}), made[0], made[1], labels, False)


def check_image(path: Path) -> None:
    """Raise DataError for a file that is no image.

    Raises:
        ImportError: Pillow is missing.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise ImportError("reading images needs Pillow; run: pip install 'ipca-lora[train]'") from None
    try:
        with Image.open(path) as image:
            image.verify()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(f"{path}: expected an image, and it cannot be read: {_words(error)}") from None


def _image_set(part: list[tuple[Path, str]], labels: tuple[str, ...]) -> Any:
    datasets = _datasets()
    columns = {"image": [str(path) for path, _ in part], "label": [labels.index(label) for _, label in part]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(labels))})
    return datasets.Dataset.from_dict(columns, features=features)


def _declared_labels(rows: Any, layout: Layout) -> tuple[str, ...]:
    """The names that the data set itself gives its classes."""
    role = {"sequence-classification": "label", "image-classification": "label", "token-classification": "tags"}.get(
        layout.task
    )
    feature = getattr(rows, "features", {}).get(layout.columns[role]) if role else None
    feature = getattr(feature, "feature", feature)
    return tuple(getattr(feature, "names", None) or ())


def _converted(split: str, rows: Any, source: Source, layout: Layout, labels: tuple[str, ...]) -> list[Row]:
    """Rows with their values by role, each checked."""
    places = getattr(rows, "places", None)
    declared = _declared_labels(rows, layout)
    of_split = "" if split == "train" else f" of {split}"
    found = []
    for k, row in enumerate(rows):
        place = places[k] if places else f"{source.name}, row {k + 1}{of_split}"
        found.append({role: _CHECKS[role](row.get(name), place, name) for role, name in layout.columns.items()})
        if layout.input and isinstance(more := row.get(layout.input), str) and more.strip():
            found[-1]["prompt"] += f"\n\n{more}"
        if layout.task == "token-classification" and len(found[-1]["tokens"]) != len(found[-1]["tags"]):
            raise DataError(
                f"{place}: expected a tag for each token, got {len(found[-1]['tokens'])} tokens in "
                f"{layout.columns['tokens']!r} and {len(found[-1]['tags'])} tags in {layout.columns['tags']!r}."
            )
        if "label" in found[-1]:
            found[-1]["label"] = _named(found[-1]["label"], declared)
        if "tags" in found[-1]:
            found[-1]["tags"] = [_named(value, declared) for value in found[-1]["tags"]]
        for role in ("label", "tags") if labels else ():
            for value in _as_list(found[-1].get(role)):
                if str(value) not in labels and not _is_index(value, labels):
                    raise DataError(
                        f"{place}, column {layout.columns[role]!r}: {value!r} is not one of {', '.join(labels[:8])}."
                    )
    if not found:
        raise DataError(f"{source.name} holds no rows{of_split}.")
    return found


def _named(value: Any, names: tuple[str, ...]) -> Any:
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _is_index(value: Any, labels: tuple[str, ...]) -> bool:
    """Whether ``value`` is the place of a class, which it cannot be where classes are named by numbers."""
    return isinstance(value, int) and 0 <= value < len(labels) and not any(map(_is_integer, labels))


def _is_integer(name: str) -> bool:
    return re.fullmatch(r"-?\d+", name) is not None


def _classes(layout: Layout, rows: list[Row]) -> tuple[str, ...]:
    """The names of the classes in ``rows``, numbers in their order; at least two."""
    role = "label" if "label" in layout.columns else "tags" if "tags" in layout.columns else None
    if role is None:
        return ()
    values = {str(value) for row in rows for value in _as_list(row[role])}
    found = sorted(values, key=int if all(map(_is_integer, values)) else None)
    if len(found) < 2:
        raise DataError(
            f"column {layout.columns[role]!r}: expected at least two classes, got only {', '.join(map(repr, found))}."
        )
    return tuple(found)


def _numbered(rows: list[Row], layout: Layout, classes: tuple[str, ...]) -> Any:
    """A data set whose labels are indices of ``classes``."""
    datasets = _datasets()
    index = {name: k for k, name in enumerate(classes)}

    def number(value: Any) -> int:
        return index[str(value)] if str(value) in index else int(value)

    for row in rows:
        if "label" in row:
            row["label"] = number(row["label"])
        if "tags" in row:
            row["tags"] = [number(value) for value in row["tags"]]
    made = datasets.Dataset.from_list(rows)
    if "label" in layout.columns:
        made = made.cast_column("label", datasets.ClassLabel(names=list(classes)))
    return made.cast_column("image", datasets.Image()) if "image" in layout.columns else made


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _check_text(value: Any, place: str, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}, column {column!r}: expected text, got {_short(value)}.")
    return value


def _check_label(value: Any, place: str, column: str) -> str | int:
    if isinstance(value, bool):
        return int(value)
    if not isinstance(value, str | int) or not str(value).strip():
        raise DataError(f"{place}, column {column!r}: expected the name or the number of a class, got {_short(value)}.")
    return value


def _check_tokens(value: Any, place: str, column: str) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(each, str) and each for each in value):
        raise DataError(f"{place}, column {column!r}: expected a list of words, got {_short(value)}.")
    return value


def _check_tags(value: Any, place: str, column: str) -> list[str | int]:
    if not isinstance(value, list) or not all(isinstance(each, str | int) for each in value):
        raise DataError(f"{place}, column {column!r}: expected a list of names or numbers, got {_short(value)}.")
    return [int(each) if isinstance(each, bool) else each for each in value]


def _check_messages(value: Any, place: str, column: str) -> list[dict[str, str]]:
    """``[{"role": …, "content": …}, …]``, also of ShareGPT's ``from`` and ``value``; the last one is an answer."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}, column {column!r}: expected a list of messages, got {_short(value)}.")
    messages = []
    for k, each in enumerate(value, start=1):
        role = each.get("role", each.get("from")) if isinstance(each, dict) else None
        content = each.get("content", each.get("value")) if isinstance(each, dict) else None
        if role not in _SPEAKERS or not isinstance(content, str):
            raise DataError(
                f"{place}, column {column!r}, message {k}: expected role (system, user or assistant) and content, got "
                f"{_short(each)}."
            )
        messages.append({"role": _SPEAKERS[role], "content": content})
    if not any(each["role"] == "assistant" for each in messages):
        raise DataError(f"{place}, column {column!r}: expected a message of the assistant, got none.")
    return messages


def _check_image_value(value: Any, place: str, column: str) -> Any:
    if isinstance(value, str):
        check_image(Path(value))
    elif value is None:
        raise DataError(f"{place}, column {column!r}: expected an image, got nothing.")
    return value


_CHECKS: dict[str, Callable[[Any, str, str], Any]] = {
    "text": _check_text,
    "prompt": _check_text,
    "completion": _check_text,
    "label": _check_label,
    "tokens": _check_tokens,
    "tags": _check_tags,
    "messages": _check_messages,
    "image": _check_image_value,
}


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    text = value if isinstance(value, str) and value.strip() else json.dumps(value, default=repr, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
