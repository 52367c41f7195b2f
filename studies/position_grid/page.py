"""The page of the study, docs/results/position-grid.md: pictures, tables and sentences from the rows at hand.

python -m studies.position_grid.page [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from studies.frontier import page
from studies.frontier.analysis import Analysis
from studies.frontier.figures import draw, draw_positions
from studies.position_grid.protocol import PROTOCOL


def sections(analysis: Analysis, folder: Path) -> dict[str, str]:
    """The text between the markers of the page, by marker; the pictures are in ``folder``."""
    shape = "\n".join(f"- {sentence}" for sentence in page.shape_sentences(analysis))
    picture = page.picture(analysis, folder, "positions")
    return {
        **page.sections(analysis, folder),
        "shape": shape or page.NOT_RUN,
        "positions": f"{picture}\n\n{page.positions_table(analysis)}".strip(),
        "lines": page.shapes_table(analysis),
    }


def main() -> int:
    """Draw the pictures and write the page, or check it; returns the exit status."""
    return page.write_page(PROTOCOL, "position-grid.md", sections, __doc__, (draw, draw_positions))


if __name__ == "__main__":
    sys.exit(main())
