"""The derived tables, the pictures and the page of the study, docs/results/window-position.md, and the table of
docs/choosing-a-window.md that rests on it; from the rows at hand.

python -m studies.window_position.page [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from studies.page import checks_only, update_page
from studies.window_position import figures, findings
from studies.window_position.rows import Study
from studies.window_position.rules import read_tables
from studies.window_position.tables import begin_section, sections

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE, CHOOSING = DOCS / "results" / "window-position.md", DOCS / "choosing-a-window.md"


def main() -> int:
    """Write tables, pictures and the generated sections of both pages, or check tables and pages; the exit status."""
    study = Study()
    if not checks_only(__doc__):
        findings.write(study)
    elif old := findings.outdated(study):
        print(f"not what the rows in {study.folder} give: {', '.join(old)}; run: make study-page", file=sys.stderr)
        return 1
    tables = read_tables(study)
    return max(
        update_page(page, made, "make study-page", __doc__, pictures)
        for page, made, pictures in (
            (PAGE, lambda: sections(study.folder), lambda: figures.draw(tables, study.folder)),
            (CHOOSING, lambda: {"begin": begin_section(tables)}, dict),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
