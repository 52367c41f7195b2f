"""The comparisons at equal success in one small table: README.md.

python -m studies.overview.readme [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from studies.frontier.page import NOT_RUN
from studies.overview.page import Found, answers, sources
from studies.page import markdown, update_page

PAGE = Path(__file__).resolve().parents[2] / "README.md"
_COLUMNS = {
    "plain LoRA": "middle window against plain LoRA",
    "principal window": "middle window against the principal one",
    "minor window": "middle window against the minor one",
}
"""Questions by the column that answers them."""
_WORDS = {"lower": "**less**", "higher": "**more**", "equivalent": "**alike**", "not shown": "no difference shown"}
_OPEN = "no verdict yet"


def table(found: Mapping[str, list[Found]]) -> str:
    """A row for each model and task: the ratios at the targets and a word for them, by what they are compared with."""
    pairs = {name: {pair.cell: pair for pair in found.get(question, [])} for name, question in _COLUMNS.items()}
    cells = list(dict.fromkeys(cell for of in pairs.values() for cell in of))
    rows = [[cell, *(_text(of[cell]) if cell in of else "–" for of in pairs.values())] for cell in cells]
    return markdown(["KL with the middle window, over KL with", *_COLUMNS], rows)


def _text(pair: Found) -> str:
    """Such as ``**less**: 0.58, 0.55, 0.54 (n = 5)``; a target that is not reached is left out at the end."""
    values = [f"{c.ratio.value:.2f}" for c in pair.targets if c.ratio is not None]
    return f"{word(pair)}: {', '.join(values)} (n = {pair.n})"


def word(pair: Found) -> str:
    """What holds at the targets with a verdict; bold where that is shown."""
    if len(pair.decided) > 1:
        return "depends on the target"
    return _WORDS[pair.decided.pop()] if pair.is_decided else _OPEN


def main() -> int:
    """Write the table, or check it; returns the exit status."""
    found = answers(sources())
    return update_page(PAGE, lambda: {"ratios": table(found) if found else NOT_RUN}, "make study-page", __doc__)


if __name__ == "__main__":
    sys.exit(main())
