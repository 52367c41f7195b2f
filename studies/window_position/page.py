"""The page of the study, docs/results/window-position.md: regenerate its sections, or check that they are up to date.

    python -m studies.window_position.page [--check]

The text between the markers ``<!-- study:NAME -->`` is generated from the tables in ``results``; the rest is written by
hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from studies.window_position.tables import sections

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "window-position.md"


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


def main() -> int:
    """Write the page; with ``--check`` change nothing, and return 1 if it is out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the page is out of date")
    args = parser.parse_args()
    before = PAGE.read_text(encoding="utf-8")
    after = render(before, sections())
    if not args.check:
        PAGE.write_text(after, encoding="utf-8")
    elif after != before:
        print(f"{PAGE.name} is out of date; run: make study-page", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
