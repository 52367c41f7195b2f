"""The page of the study, docs/results/language.md: pictures, tables and sentences from the rows at hand.

python -m studies.language.page [--check]
"""

from __future__ import annotations

import sys

from studies.frontier.analysis import Analysis
from studies.frontier.figures import draw
from studies.frontier.page import PAGES, sections
from studies.frontier.rows import Rows
from studies.language.protocol import PLAN, PROTOCOL
from studies.page import update_page


def main() -> int:
    """Draw the pictures and write the page, or check it; returns the exit status."""
    folder = PROTOCOL.results / PROTOCOL.model
    analysis = Analysis(PROTOCOL.with_targets(Rows(folder / "reference")) or PLAN, Rows(folder))
    if "--check" not in sys.argv:
        draw(analysis, folder)
    return update_page(PAGES / "language.md", lambda: sections(analysis, folder), "make study-page", __doc__)


if __name__ == "__main__":
    sys.exit(main())
