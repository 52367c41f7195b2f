"""Pages with generated sections: the text between ``<!-- study:NAME -->`` markers; the rest is written by hand."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def update_page(page: Path, sections: Callable[[], Mapping[str, str]], command: str, doc: str | None) -> int:
    """Command-line entry point of a page: write its sections; with ``--check`` change nothing, 1 if it is out of date.

    Args:
        page: the Markdown file.
        sections: makes the text of each section.
        command: what makes the page, for the message.
        doc: description of the command.
    """
    check = checks_only(doc)
    before = page.read_text(encoding="utf-8")
    after = render(before, sections())
    if not check:
        page.write_text(after, encoding="utf-8")
    elif after != before:
        print(f"{page.name} is out of date; run: {command}", file=sys.stderr)
        return 1
    return 0


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
