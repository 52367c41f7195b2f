"""The page of the study, docs/results/window-position.md: regenerate its sections, or check that they are up to date.

python -m studies.window_position.page [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from studies.page import update_page
from studies.window_position.tables import sections

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "window-position.md"


def main() -> int:
    """Write the page, or check it; returns the exit status."""
    return update_page(PAGE, sections, "make study-page", __doc__)


if __name__ == "__main__":
    sys.exit(main())
