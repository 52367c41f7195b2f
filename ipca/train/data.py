"""Data of a run: its task and columns, every row checked, before any model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipca.model.targets import few
from ipca.train.classes import as_list, find_classes, in_order_of_base, place_of
from ipca.train.row_checks import ROW_CHECKS, text_below, unread_fields
from ipca.train.sources import (
    HELD_OUT_SPLITS,
    DataError,
    Row,
    Source,
    check_image,
    datasets_library,
    load_rows,
    read_text,
    with_bar,
)

log = logging.getLogger("ipca.train")

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
NO_COLUMNS = {"text": "running text", "images": "a folder of images"}
"""Kinds of sources without columns."""
_SHOWN = 8
"""Names in a message at most."""


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


def read_data(
    source: Source,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    *,
    labels: Iterable[str] = (),
    base: Iterable[str] = (),
    progress: bool = False,
) -> Data:
    """All rows of ``source``, checked; a line of the log says what of it is used for what, and what is left out.

    Args:
        task: one of :data:`ipca.train.settings.TASKS`; default: what the columns say.
        columns: names by role, for those that cannot be found by their names.
        labels: the classes, where they are known already; a row with another one is an error.
        base: the classes of the base model, in whose order the same ones of the data are.
        progress: show a bar where this takes long.

    Raises:
        DataError: a row is not what the task needs.
        ImportError: ``datasets`` is missing.
        FileNotFoundError, ValueError: nothing to read, or columns that fit no task, or that the source does not have.
    """
    if columns and source.kind in NO_COLUMNS:
        raise ValueError(
            f"{source.name} holds {NO_COLUMNS[source.kind]}, which has no columns to name; leave --columns out."
        )
    if source.kind == "images":
        return _read_images(source, task, tuple(labels), tuple(base), progress)
    if source.kind == "text":
        return _read_text(source, task)
    sets = load_rows(source)
    train = sets["train"]
    layout = find_layout(train.column_names, task, columns or {}, source.name)
    declared, role = _declared_labels(train, layout), _class_role(layout)
    made = [_converted("train", train, source, layout, tuple(labels) or declared, progress)]
    classes = tuple(labels) if role else ()
    if role and not classes:
        found = declared or find_classes(made[0], role, layout.columns[role])
        classes = in_order_of_base(found, tuple(base), source.name)
    if role and labels and (numbers := {str(value) for row in made[0] for value in as_list(row[role])} - {*classes}):
        places = [f"{number} {classes[int(number)]}" for number in sorted(numbers, key=int)]
        log.info("%s: numbers are places among the classes: %s", source.name, ", ".join(places[:_SHOWN]))
    if "held_out" in sets:
        made.append(_converted("held_out", sets["held_out"], source, layout, classes, progress))
    chats = layout.columns.get("messages")
    fields = () if chats is None else sorted({name for row in train for name in unread_fields(row[chats])})
    _log_use(source, layout, task, train.column_names, classes, fields=fields)
    rows, held_out = [_numbered(each, layout, classes) for each in made] + [None] * (2 - len(made))
    return Data(layout, rows, held_out, classes, whole=False)


def find_layout(names: Iterable[str], task: str | None, columns: Mapping[str, str], source: str) -> Layout:
    """What data with columns of these ``names`` is for.

    Raises:
        ValueError: they fit no task, a named column is not there, or no task, or not this one, takes its role.
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
    known = [(task, roles) for roles in _ROLES[task]] if task else list(_GUESSES)
    wanted = [(kind, roles) for kind, roles in known if {*columns} <= {*roles}]
    if not wanted:
        raise ValueError(_misfit(columns, task, known, source))
    for kind, roles in wanted:
        if set(roles) <= set(found) and len({found[role] for role in roles}) == len(roles):
            extra = lower.get("input") if roles == ("prompt", "completion") else None
            return Layout(kind, {role: found[role] for role in roles}, extra if extra not in found.values() else None)
    shown = wanted[0][1] if task or columns else ("prompt", "completion") if len(names) > 1 else ("text",)
    free = iter([name for name in names if name not in columns.values()])
    example = " ".join(f"{role}={columns.get(role) or next(free, 'NAME')}" for role in shown)
    raise ValueError(
        f"{source} has the columns {', '.join(names)}; "
        + (f"the task {task} needs" if task else "a task needs")
        + f" {_either(wanted)}. Name them, such as --columns {example}."
    )


def _misfit(
    columns: Mapping[str, str], task: str | None, known: Iterable[tuple[str, Iterable[str]]], source: str
) -> str:
    """Why the roles of ``columns`` fit no layout that is ``known``."""
    taken = {role for _, roles in known for role in roles}
    wrong = [role for role in columns if role not in taken] or list(columns)
    verb, rest = ("has", "it") if len(wrong) == 1 else ("have", "one")
    return (
        f"{source}: {f'the task {task}' if task else 'a task'} takes the columns {_either(known)}, where "
        f"{' and '.join(wrong)} of --columns {verb} no place; leave {rest} out"
        + (", or choose another --task." if task else ".")
    )


def _either(layouts: Iterable[tuple[str, Iterable[str]]]) -> str:
    return " or ".join(" + ".join(roles) for _, roles in layouts)


def _read_text(source: Source, task: str | None) -> Data:
    if task not in (None, "causal-lm"):
        raise ValueError(f"{source.name} is running text, which is for the task causal-lm; {task} needs rows.")
    made = []
    for files in (source.files, source.held_out):
        texts = [text for path in files if (text := read_text(path)).strip()]
        if files and not texts:
            raise DataError(f"{source.name} holds no text" + (f" in {files[0].name}." if source.held_out else "."))
        made.append(datasets_library().Dataset.from_dict({"text": texts}) if files else None)
    layout = Layout("causal-lm", {"text": "text"})
    _log_use(source, layout, task)
    return Data(layout, made[0], made[1], (), whole=True)


def _read_images(
    source: Source, task: str | None, known: tuple[str, ...], base: tuple[str, ...], progress: bool
) -> Data:
    """Images in one folder a class, ``train/`` and ``test/`` around them or not."""
    if task not in (None, "image-classification"):
        raise ValueError(f"{source.name} holds images, which are for the task image-classification, not {task}.")
    root = Path(source.name)
    splits: dict[str, list[tuple[Path, str]]] = {}
    for path in source.files:
        parts = path.parent.relative_to(root).parts
        in_split = parts[:1] and parts[0].lower() in ("train", *HELD_OUT_SPLITS)
        split, folders = (parts[0], parts[1:]) if in_split else ("", parts)
        if len(folders) != 1:
            got = f"the nested folders {Path(*folders)}" if folders else "no such folder"
            raise DataError(
                f"{path}: expected an image in a folder named by its class, such as {root / split / 'cat'}, got {got}; "
                f"only train, {', '.join(HELD_OUT_SPLITS)} hold folders of classes."
            )
        splits.setdefault(split.lower() or "train", []).append((path, folders[0]))
    first = "train" if "train" in splits else min(splits)
    train = splits[first]
    held_out = [name for name in HELD_OUT_SPLITS if name in splits and name != first]
    other = splits[held_out[0]] if held_out else None
    found = known or tuple(sorted({label for _, label in train}))
    if len(found) < 2:
        raise DataError(f"{source.name}: expected a folder for each class, at least two; got {', '.join(found)}.")
    labels = known or in_order_of_base(found, base, source.name)
    every = (*train, *(other or ()))
    for path, label in every:
        if place_of(label, labels) is None:
            raise DataError(f"{path}: the class {label!r} is not one of {', '.join(labels[:8])}.")
    for path, _ in with_bar(every, "image", progress):
        check_image(path, str(path))
    made = [None if part is None else _image_set(part, labels) for part in (train, other)]
    layout = Layout("image-classification", {"image": "image", "label": "label"})
    _log_use(source, layout, task, labels=labels, splits=held_out[1:])
    return Data(layout, made[0], made[1], labels, False)


def _image_set(part: list[tuple[Path, str]], labels: tuple[str, ...]) -> Any:
    datasets = datasets_library()
    columns = {"image": [str(path) for path, _ in part], "label": [place_of(label, labels) for _, label in part]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(labels))})
    return datasets.Dataset.from_dict(columns, features=features)


def _log_use(
    source: Source,
    layout: Layout,
    task: str | None,
    names: Iterable[str] = (),
    labels: tuple[str, ...] = (),
    splits: Iterable[str] = (),
    fields: Iterable[str] = (),
) -> None:
    """Log what ``source`` is used for: the task where it was found, columns by role, classes, what is left out.

    Args:
        names: of all columns; empty where there are none.
        splits: folders of images that are not read.
        fields: of messages that are not read.
    """
    used = layout.columns | ({"input": layout.input} if layout.input else {})
    words = [] if task else [f"task {layout.task}"]
    if names := list(names):
        words += [", ".join(f"{role} from column {column!r}" for role, column in used.items())]
    if labels:
        words += [f"{len(labels)} classes" + (f" ({', '.join(labels)})" if len(labels) <= _SHOWN else "")]
    if unused := [repr(name) for name in names if name not in used.values()]:
        words += [f"columns left out: {', '.join(unused)}"]
    if unread := [repr(name) for name in fields]:
        words += [f"fields of messages left out: {', '.join(unread)}"]
    if source.held_out:
        words += [f"held out: {few([str(path.relative_to(source.name)) for path in source.held_out], _SHOWN)}"]
    if rest := [f"{name}/" for name in splits] + [str(path.relative_to(source.name)) for path in source.skipped]:
        words += [f"files left out: {few(rest, _SHOWN)}"]
    if words:
        log.info("%s: %s", source.name, "; ".join(words))


def _class_role(layout: Layout) -> str | None:
    """The role of the column of classes; None for language models."""
    return next((role for role in ("label", "tags") if role in layout.columns), None)


def _declared_labels(rows: Any, layout: Layout) -> tuple[str, ...]:
    """The names that the data set itself gives its classes."""
    role = _class_role(layout)
    feature = getattr(rows, "features", {}).get(layout.columns[role]) if role else None
    feature = getattr(feature, "feature", feature)
    return tuple(getattr(feature, "names", None) or ())


def _converted(
    split: str, rows: Any, source: Source, layout: Layout, labels: tuple[str, ...], progress: bool
) -> list[Row]:
    """Rows with their values by role, each checked."""
    datasets, image = datasets_library(), layout.columns.get("image", "")
    if isinstance(getattr(rows, "features", {}).get(image), datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))  # one that cannot be decoded has no place yet
    places = getattr(rows, "places", None)
    declared = _declared_labels(rows, layout)
    of_split = "" if split == "train" else f" of {split}"
    found = []
    for k, row in enumerate(with_bar(rows, "row", progress)):
        place = places[k] if places else f"{source.name}, row {k + 1}{of_split}"
        found.append({role: ROW_CHECKS[role](row.get(name), place, name) for role, name in layout.columns.items()})
        if layout.input:
            found[-1]["prompt"] += text_below(row.get(layout.input), place, layout.input)
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
            for value in as_list(found[-1].get(role)):
                if place_of(value, labels) is None:
                    raise DataError(
                        f"{place}, column {layout.columns[role]!r}: {value!r} is not one of {', '.join(labels[:8])}."
                    )
    if not found:
        raise DataError(f"{source.name} holds no rows{of_split}.")
    return found


def _named(value: Any, names: tuple[str, ...]) -> Any:
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _numbered(rows: list[Row], layout: Layout, classes: tuple[str, ...]) -> Any:
    """A data set whose labels are indices of ``classes``."""
    datasets = datasets_library()
    names = {str(value) for row in rows for role in ("label", "tags") for value in as_list(row.get(role))}
    places = {name: place_of(name, classes) for name in names}
    for row in rows:
        if "label" in row:
            row["label"] = places[str(row["label"])]
        if "tags" in row:
            row["tags"] = [places[str(value)] for value in row["tags"]]
    made = datasets.Dataset.from_list(rows)
    if "label" in layout.columns:
        made = made.cast_column("label", datasets.ClassLabel(names=list(classes)))
    return made.cast_column("image", datasets.Image()) if "image" in layout.columns else made
