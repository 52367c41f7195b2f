"""Sources of data: files by their endings, folders, the Hub; rows of JSON and CSV with their places."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger("ipca.train")

Row = dict[str, Any]

_KINDS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_KINDS |= {".txt": "text", ".md": "text"}
_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_ABOUT = ("LICENCE", "LICENSE", "README")
"""Files that speak of the data beside them."""
HELD_OUT_SPLITS = ("validation", "val", "test")
"""Folders and files beside ``train``; the first is held out."""
_SPLIT = re.compile(rf"(train|{'|'.join(HELD_OUT_SPLITS)})([-_.]\d.*)?", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        name: as the user gave it.
        kind: ``json``, ``csv``, ``parquet``, ``text``, ``images``, or ``hub``.
        files: of this kind, sorted; empty for the Hub.
        skipped: the other files of a folder, hidden ones last.
        held_out: files of rows or text beside those of ``train``, by their names or folders.
    """

    name: str
    kind: str
    files: tuple[Path, ...] = ()
    skipped: tuple[Path, ...] = ()
    held_out: tuple[Path, ...] = ()


class DataError(ValueError):
    """A row is not what the task needs; the message names file, line and column, and what was expected."""


def find_source(name: str) -> Source:
    """Files by their endings, or an id on the Hub; of a folder nothing hidden, and no README beside data.

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
    every = sorted(each for each in path.rglob("*") if each.is_file())
    hidden = [each for each in every if any(part.startswith(".") for part in each.relative_to(path).parts)]
    files = sorted({*every} - {*hidden})
    images = [each for each in files if each.suffix.lower() in _IMAGES]
    known = [each for each in files if each.suffix.lower() in _KINDS]
    taken = images or [each for each in known if each.stem.upper() not in _ABOUT] or known
    skipped = (*sorted({*files} - {*taken}), *hidden)
    if images:
        return Source(name, "images", tuple(images), skipped)
    kinds = sorted({_KINDS[each.suffix.lower()] for each in taken})
    if len(kinds) != 1:
        what = f"holds {' and '.join(kinds)} files; give one kind" if kinds else "holds no file of a known format"
        raise ValueError(f"{name} {what}. Known are {', '.join(_KINDS)} and folders of images.")
    train, held_out = _splits(path, taken)
    skipped = (*sorted({*files} - {*train, *held_out}), *hidden)
    return Source(name, kinds[0], tuple(train), skipped, tuple(held_out))


def _splits(folder: Path, files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Those of ``train`` and those held out, where every file is of a split; else all, and none."""
    splits: dict[str, list[Path]] = {}
    for path in files:
        place = path.relative_to(folder)
        found = [match[1].lower() for name in (*place.parts[:-1], place.stem) if (match := _SPLIT.fullmatch(name))]
        splits.setdefault(found[0] if found else "", []).append(path)
    beside = [name for name in HELD_OUT_SPLITS if name in splits]
    if "" in splits or "train" not in splits or not beside:
        return files, []
    return splits["train"], splits[beside[0]]


def _kind(path: Path) -> str:
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path} has an unknown format; known are {', '.join(_KINDS)} and folders of images.")
    return kind


def datasets_library() -> Any:
    """The package ``datasets``, without its progress bars.

    Raises:
        ImportError: it is missing.
    """
    try:
        import datasets
    except ImportError:
        raise ImportError("reading data needs datasets; run: pip install 'ipca-lora[train]'") from None
    datasets.disable_progress_bars()
    return datasets


def load_rows(source: Source) -> dict[str, Any]:
    """``train`` and, where the source has it, ``held_out``; rows of JSON and CSV know their places."""
    datasets = datasets_library()
    parts = {"train": source.files} | ({"held_out": source.held_out} if source.held_out else {})
    if source.kind in ("json", "csv"):
        return {split: _placed(source, files) for split, files in parts.items()}
    if source.kind == "parquet":
        names = {split: [str(path) for path in files] for split, files in parts.items()}
        try:
            return dict(datasets.load_dataset("parquet", data_files=names))
        except Exception as error:
            raise DataError(f"{source.name} cannot be read as Parquet: {one_line(error)}") from None
    try:
        splits = datasets.load_dataset(source.name)
    except Exception as error:  # of the network, of the Hub, of a data set with several configurations
        raise FileNotFoundError(
            f"there is no file {source.name}, and no such data set on the Hub: {one_line(error)}"
        ) from None
    train = "train" if "train" in splits else next(iter(splits))
    other = [name for name in ("validation", "test") if name in splits and name != train][:1]
    if rest := sorted({*splits} - {train, *other}):
        log.info("%s: not read: the splits %s", source.name, ", ".join(rest))
    return {"train": splits[train]} | ({"held_out": splits[other[0]]} if other else {})


class _Placed:
    """Rows that know their places, in the way of a ``datasets.Dataset``."""

    def __init__(self, rows: list[Row], places: list[str], column_names: list[str]) -> None:
        self.rows, self.places, self.column_names = rows, places, column_names

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def _placed(source: Source, files: tuple[Path, ...]) -> _Placed:
    read = _csv_rows if source.kind == "csv" else _json_rows
    placed = [each for path in files for each in read(path)]
    if not placed:
        raise DataError(f"{source.name} holds no rows" + (f" in {files[0].name}." if source.held_out else "."))
    names = list(dict.fromkeys(name for _, row in placed for name in row))
    rows = [{name: row.get(name) for name in names} for _, row in placed]
    return _Placed(rows, [place for place, _ in placed], names)


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    text = read_text(path)
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
                        f"{path}, line {k}: expected one JSON object, got {shortened(line)} ({error})"
                    ) from None
    escaped = "\\u" in text  # which alone makes half of a pair
    for place, row in numbered:
        if not isinstance(row, dict):
            raise DataError(f"{place}: expected an object with named columns, got {shortened(row)}.")
        if escaped and re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
            raise DataError(f"{place}: expected text in Unicode, got half of a surrogate pair, such as \\ud800.")
        yield place, row


def _csv_rows(path: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(1 << 30)
    lines = read_text(path).split("\n")
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
                    raise DataError(
                        f"{path}, line {first}: expected columns of different names, got {shortened(values)}."
                    )
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


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with line breaks as ``\\n``.

    Raises:
        DataError: it is not UTF-8; the message names the line.
    """
    try:
        return path.read_text(encoding="utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line}: expected text in UTF-8, got the byte 0x{error.object[error.start]:02x}."
        ) from None


def read_image(image: Path | bytes) -> Any:
    """An image in RGB, turned as its EXIF data say, as ``datasets`` reads those that train."""
    path, data = (None, image) if isinstance(image, bytes) else (str(image.absolute()), None)
    return datasets_library().Image().decode_example({"path": path, "bytes": data}).convert("RGB")


def check_image(image: Path | bytes, place: str) -> None:
    """Raise DataError for an image that training could not read: it is decoded, as a header says nothing of the rest.

    Raises:
        ImportError: Pillow is missing.
    """
    datasets_library()
    try:
        from PIL import UnidentifiedImageError
    except ImportError:
        raise ImportError("reading images needs Pillow; run: pip install 'ipca-lora[train]'") from None
    try:
        read_image(image)
    except Exception as error:  # each format has its own
        why = "its format is unknown" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise DataError(f"{place}: expected an image, and it cannot be read: {why}") from None


def with_bar(items: Any, unit: str, progress: bool) -> Any:
    """``items`` with a progress bar, where they take longer than a few seconds to check."""
    from tqdm import tqdm

    return tqdm(items, desc="Data", unit=unit, delay=5, disable=None if progress else True)


def shortened(value: Any) -> str:
    """``value`` as text of at most 60 characters."""
    if value is None:
        return "nothing"
    text = value if isinstance(value, str) and value.strip() else json.dumps(value, default=repr, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def one_line(error: Exception) -> str:
    """The message of ``error`` in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]
