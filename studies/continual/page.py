"""The page of the study, docs/results/continual.md: a picture, tables and sentences from the rows at hand.

python -m studies.continual.page [--check]
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ipca.analysis.figures import PALETTE
from ipca.lab.statistics import Interval
from ipca.lab.sweep.report.style import Style
from studies.continual.analysis import METRICS, MIDDLE, Analysis, Compared
from studies.continual.design import CENTERS, RATES
from studies.continual.rows import RESULTS, Rows
from studies.page import markdown, update_page
from studies.plots import Point, marks, sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "continual.md"
NAMES = {
    "fresh": "fresh middle windows",
    "pissa": "fresh principal windows",
    "milora": "fresh minor windows",
    "lora-fresh": "fresh plain LoRA",
    "lora": "one plain LoRA",
    "o-lora": "O-LoRA",
    "sd-lora": "SD-LoRA",
    "osf": "OSF",
    "fixed": "one middle window",
    "disjoint": "disjoint windows",
}
_TITLES = {"acc": "accuracy after five tasks", "bwt": "change of earlier tasks", "retained_after": "accuracy on digits"}
_NOTHING = "Not run."


def sections(analysis: Analysis) -> dict[str, str]:
    """The text between the markers of the page, by marker."""
    compared = analysis.compared()
    return {
        "findings": "\n".join(f"- {sentence(each)}" for each in compared) or _NOTHING,
        "picture": "![each method](../../studies/continual/results/methods.png)" if compared else _NOTHING,
        "comparisons": comparisons(compared) if compared else _NOTHING,
        "methods": methods(analysis) if any(map(analysis.tuned, CENTERS)) else _NOTHING,
        "rates": every_rate(analysis) if any(map(analysis.tuned, CENTERS)) else _NOTHING,
    }


def sentence(found: Compared) -> str:
    """What the protocol says of a comparison."""
    pair = f"{NAMES[MIDDLE].capitalize()} against {NAMES[found.method]}"
    result = mean_text(found)
    if found.why:
        return f"{pair}: no verdict ({found.why})."
    shown = f", though shown to be {found.direction}" if found.direction else ""
    words = {
        "higher": f"they end with a higher accuracy ({result})",
        "lower": f"they end with a lower accuracy ({result})",
        "alike": f"alike, within one point{shown} ({result})",
        "not shown": f"no difference shown ({result})",
    }[found.verdict]
    return f"{pair}: {words}, adjusted p {found.adjusted:.3f}, n = {found.n}."


def mean_text(found: Compared) -> str:
    """``+0.003 [0.002, 0.004]``, the difference of the accuracies."""
    return signed_text(found.mean, found.interval)


def signed_text(mean: float, interval: Interval) -> str:
    """``+0.003 [0.002, 0.004]``."""
    return f"{_signed(mean)} {_interval(interval)}"


def comparisons(compared: list[Compared]) -> str:
    """The primary comparisons as a table."""
    rows = [
        [
            NAMES[each.method],
            str(each.n),
            mean_text(each),
            f"{each.p:.3f}",
            "–" if each.adjusted is None else f"{each.adjusted:.3f}",
            each.words or each.why,
        ]
        for each in compared
    ]
    return markdown(["against", "n", "ACC, difference [95 % interval]", "p", "adjusted p", "verdict"], rows)


def methods(analysis: Analysis) -> str:
    """Each method at its best rate as a table."""
    rows = []
    for method in CENTERS:
        taken, seeds = sorted(analysis.taken(method).items()), analysis.seeds(method)
        cells = [_mean(analysis.mean_of(method, metric)) for metric in METRICS]
        at = ", ".join(f"{rate:g} ({count})" if len(taken) > 1 else f"{rate:g}" for rate, count in taken) or "–"
        rate = f"{at}, edge" if taken and analysis.is_edge(method) else at
        rates = ", ".join(f"{each:g}" for each in analysis.rates(method))
        rows.append([NAMES[method], rate, rates, str(len(seeds)), *cells])
    table = markdown(["method", "best rate (seeds)", "rates", "seeds", *_TITLES.values()], rows)
    return f"{table}\n\nBefore the first task the accuracy on digits is {_number(analysis.before)}."


def every_rate(analysis: Analysis) -> str:
    """Accuracy after five tasks, and on digits, of each method at each rate."""
    used = [rate for rate in RATES if any(rate in analysis.rates(method) for method in CENTERS)]
    rows = []
    for method in CENTERS:
        pairs = [[analysis.at_rate(method, rate, metric) for metric in ("acc", "retained_after")] for rate in used]
        cells = [" / ".join(_number(value) for value in pair if value is not None) or "–" for pair in pairs]
        rows.append([NAMES[method], *cells])
    return markdown(["method", *(f"{rate:g}" for rate in used)], rows)


def draw(analysis: Analysis) -> dict[Path, Figure]:
    """One mark a method: the accuracy over its tasks and that on digits, with intervals."""
    known = [method for method in CENTERS if analysis.tuned(method)]
    if not known:
        return {}
    note = "each method at its best rate; mean and 95 % interval over seeds"
    with sheet(1, 2, note, wide=4.6, high=3.2) as (figure, axes):
        for axis, metric in zip(axes[0], ("acc", "retained_after"), strict=True):
            for x, method in enumerate(known):
                found = analysis.mean_of(method, metric)
                assert found is not None
                mean, (low, high) = found
                ends = (low, high) if math.isfinite(low) else (None, None)
                point = Point(mean, ends[0], ends[1], 0, x)
                color = PALETTE[0 if method == MIDDLE else 1]
                marks(axis, [point], Style(color, color, "o", "-"), "_")
            axis.set_xticks(range(len(known)), [NAMES[method] for method in known], rotation=40, ha="right")
            axis.set_ylabel(_TITLES[metric])
    return {RESULTS / "methods.png": figure}


def _mean(found: tuple[float, Interval] | None) -> str:
    return "–" if found is None else f"{_number(found[0])} {_interval(found[1])}".strip()


def _interval(found: Interval) -> str:
    return f"[{_number(found.low)}, {_number(found.high)}]" if math.isfinite(found.low) else ""


def _number(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def main() -> int:
    """Draw the picture and write the page, or check it; returns the exit status."""
    analysis = Analysis(Rows())
    return update_page(PAGE, lambda: sections(analysis), "make study-page", __doc__, lambda: draw(analysis))


if __name__ == "__main__":
    sys.exit(main())
