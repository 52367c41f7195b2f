"""The page of the study, docs/results/language.md: pictures, tables and sentences from the rows at hand.

python -m studies.language.page [--check]
"""

from __future__ import annotations

import sys

from studies.frontier.figures import draw
from studies.frontier.page import sections, write_page
from studies.language.protocol import PROTOCOL


def main() -> int:
    """Draw the pictures and write the page, or check it; returns the exit status."""
    return write_page(PROTOCOL, "language.md", sections, __doc__, (draw,))


if __name__ == "__main__":
    sys.exit(main())
