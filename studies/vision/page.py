"""The page of the study, docs/results/vision.md: pictures, tables and sentences from the rows at hand.

python -m studies.vision.page [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from studies.frontier.analysis import Analysis, final
from studies.frontier.figures import draw
from studies.frontier.page import NOT_RUN, cell_title, ratio_text, shared_sections, write_page
from studies.page import markdown
from studies.vision.protocol import MAIN, PROTOCOL

FEATURES = {
    "cka_photos": "1 − CKA, photographs",
    "kl_emoji": "KL, kept emoji",
    "cka_emoji": "1 − CKA, kept emoji",
    "kl_textiles": "KL, textiles",
    "cka_textiles": "1 − CKA, textiles",
}
"""Secondary measures of what was kept, with their titles."""
NEIGHBORS = {"neighbors_photos": "other neighbors, photographs", "neighbors_emoji": "other neighbors, kept emoji"}
PROBES = {"frozen_emoji": "frozen probe, error", "refit_emoji": "refit probe, error"}


def sections(analysis: Analysis, folder: Path) -> dict[str, str]:
    """The text between the markers of the page, by marker; the pictures are in ``folder``."""
    return {
        **shared_sections(analysis, folder),
        "features": features_table(analysis),
        "kept": kept_table(analysis),
        "final": final_table(analysis),
    }


def features_table(analysis: Analysis) -> str:
    """The primary comparisons at the middle target by other measures, without verdicts."""
    rows = []
    for task, steps in analysis.design.targets:
        for other in MAIN[1:]:
            ratios = [analysis.compare(task, steps, 1, MAIN[0], other, metric).ratio for metric in FEATURES]
            if any(ratios):
                title = analysis.design.title(other)
                rows.append([cell_title(analysis, task, steps), title, *map(ratio_text, ratios)])
    return markdown(["new task, steps", "middle against", *FEATURES.values()], rows) if rows else NOT_RUN


def kept_table(analysis: Analysis) -> str:
    """At the middle target: what was kept, by every measure."""
    rows, titles = [], {"kl_photos": "KL, photographs", **FEATURES, **NEIGHBORS, **PROBES}
    for task, steps in analysis.design.targets:
        for arm in analysis.design.arms:
            if analysis.of(task, steps, arm):
                cells = [_mean_of(analysis.tuned(task, steps, arm, 1, metric).values()) for metric in titles]
                rows.append([cell_title(analysis, task, steps), analysis.design.title(arm), *cells])
    return markdown(["new task, steps", "arm", *titles.values()], rows) if rows else NOT_RUN


def final_table(analysis: Analysis) -> str:
    """The models at λ = 1 at every rate: success, and what was kept, not at equal success."""
    rows = []
    titles = {"ce_new": "CE, new task", "error_new": "error, new task", "kl_photos": "KL, photographs"}
    titles |= {"cka_photos": "1 − CKA, photographs", **PROBES}
    for task, steps in analysis.design.targets:
        for arm in analysis.design.arms:
            runs = analysis.of(task, steps, arm)
            for rate in sorted({run.rate for run in runs}):
                chosen = [run for run in runs if run.rate == rate]
                means = [mean(final(analysis.runs[run], metric) for run in chosen) for metric in titles]
                cells = [f"{rate:g}", str(len(chosen)), f"{means[0]:.3f}", *(f"{value:#.3g}" for value in means[1:])]
                rows.append([cell_title(analysis, task, steps), analysis.design.title(arm), *cells])
    return markdown(["new task, steps", "arm", "rate", "n", *titles.values()], rows) if rows else NOT_RUN


def _mean_of(values: Iterable[float | None]) -> str:
    """The mean of the runs that reach the target."""
    reached = [value for value in values if value is not None]
    return f"{mean(reached):#.3g}" if reached else "–"


def main() -> int:
    """Draw the pictures and write the page, or check it; returns the exit status."""
    return write_page(PROTOCOL, "vision.md", sections, __doc__, (draw,))


if __name__ == "__main__":
    sys.exit(main())
