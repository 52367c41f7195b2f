"""Pages with generated sections: the text between ``<!-- study:NAME -->`` markers; the rest is written by hand."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from studies.plots import outdated, write_pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def update_page(
    page: Path,
    sections: Callable[[], Mapping[str, str]],
    command: str,
    doc: str | None,
    pictures: Callable[[], Mapping[Path, Figure]] = dict,
) -> int:
    """Command-line entry point of a page: write its sections and pictures; with ``--check`` only compare them.

    Args:
        page: the Markdown file.
        sections: makes the text of each section.
        command: what makes the page, for the message.
        doc: description of the command.
        pictures: draws the pictures, by file.

    Returns:
        The exit status: with ``--check``, 1 if the page or a picture is out of date.
    """
    check, figures = checks_only(doc), pictures()
    if not check:
        write_pictures(figures)
    before = page.read_text(encoding="utf-8")
    after = render(before, sections())  # may name the pictures that are there
    if not check:
        page.write_text(after, encoding="utf-8")
        return 0
    old = [path.name for path in ([page] if after != before else []) + outdated(figures)]
    if old:
        print(f"out of date: {', '.join(old)}; run: {command}", file=sys.stderr)
    return int(bool(old))


def checks_only(doc: str | None) -> bool:
    """Read the command line of a page: whether nothing may be changed. ``--help`` and wrong options end the program."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the page is out of date")
    return bool(parser.parse_args().check)


def render(text: str, made: Mapping[str, str]) -> str:
    """``text`` with the generated sections ``made`` between their markers.

    Raises:
        ValueError: a section's markers do not appear exactly once.
    """
    for name, section in made.items():
        pattern = rf"(<!-- study:{name} -->\n).*?(<!-- /study:{name} -->)"
        replacement = section.replace("\\", r"\\")
        text, count = re.subn(pattern, rf"\g<1>{replacement}\n\g<2>", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"the markers of study:{name} must appear once, found {count}.")
    return text


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
