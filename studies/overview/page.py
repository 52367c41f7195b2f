"""The studies that compare at equal success, side by side: the chart and the table of docs/choosing-a-window.md.

python -m studies.overview.page [--check]
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from ipca.analysis.figures import INK, PALETTE
from studies.frontier.analysis import Analysis, Comparison
from studies.frontier.page import NOT_RUN, STOPPED_NOTE, TARGETS, by_target, cell_title, ratio_text, stopped_text
from studies.frontier.protocol import Protocol
from studies.frontier.rows import Rows
from studies.language.protocol import PROTOCOL as LANGUAGE
from studies.page import markdown, update_page
from studies.plots import sheet
from studies.position_grid.protocol import PROTOCOL as GRID
from studies.vision.protocol import PROTOCOL as VISION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE = Path(__file__).resolve().parents[2] / "docs" / "choosing-a-window.md"
PICTURE = Path(__file__).resolve().parent / "results" / "ratios.png"
QUESTIONS = {
    "middle window against plain LoRA": (("middle", "lora"),),
    "middle window against the principal one": (("middle", "principal"),),
    "middle window against the minor one": (("middle", "minor"),),
    "middle window with a frozen factor against plain LoRA": (("frozen-A", "lora"), ("frozen-B", "lora")),
    "directions of inputs against plain LoRA": (("inputs-minor", "lora"), ("inputs-principal", "lora")),
    "full fine-tuning against plain LoRA": (("full", "lora"),),
}
"""Pairs of arms by what they are to answer."""
POSITIONS = {"middle": "0.5", "principal": "0.0", "minor": "1.0"}
"""Names of the same arms in the study of positions."""
Key = tuple[str, int, int, str, str]
"""Task, steps, place of the target, arm, other arm."""
_TICKS = (0.25, 0.5, 1.0, 2.0, 4.0)
CHOICES = ("stopped", "other kept texts", "first rates", "hardest target")
"""Choices other than the protocol's, as docs/choosing-a-window.md explains them."""
_WORDS = {"lower": "moves the model less", "higher": "moves it more"}


@dataclass(frozen=True)
class Source:
    """A study's rows.

    Attributes:
        model: for tables and the chart.
        analysis: of its rows.
        names: its names of arms, where they differ.
        kind: ``"language"`` or ``"vision"``.
    """

    model: str
    analysis: Analysis
    names: Mapping[str, str]
    kind: str = "language"


@dataclass(frozen=True)
class Found:
    """A pair of arms in one study, for one new task and length.

    Attributes:
        cell: model, new task and steps.
        arms: titles of the two.
        targets: the comparisons at the three targets, the easiest first.
        claimed: whether the protocol has a claim about the pair; otherwise there is no verdict.
        kind: of the study.
        otherwise: by :data:`CHOICES`, the ratio at the middle target under another choice than the protocol's.
    """

    cell: str
    arms: str
    targets: tuple[Comparison, ...]
    claimed: bool
    kind: str
    otherwise: Mapping[str, str]

    @property
    def n(self) -> str:
        """The number of seeds at the middle target."""
        middle = self.targets[1].ratio
        return str(middle.n if middle is not None else 0)

    @property
    def ratios(self) -> list[str]:
        """The ratio at each target, with its number of seeds where that is another one than :attr:`n`."""
        found = [c.ratio for c in self.targets]
        seeds = ["" if each is None or str(each.n) == self.n else f", n = {each.n}" for each in found]
        return [ratio_text(each) + n for each, n in zip(found, seeds, strict=True)]

    @property
    def decided(self) -> set[str]:
        """The verdicts at the targets that have one."""
        return {c.verdict for c in self.targets if self.claimed and not c.obstacle}

    @property
    def is_decided(self) -> bool:
        """Whether there is a verdict at a target."""
        return bool(self.decided)

    @property
    def verdict(self) -> str:
        """The verdict at the three targets, or why there is none."""
        if not self.claimed:
            return "described only"
        if not self.is_decided:
            return "; ".join(dict.fromkeys(c.obstacle for c in self.targets if c.obstacle))
        return by_target([_WORDS.get(c.words, c.words) for c in self.targets])


def sources() -> list[Source]:
    """The studies whose targets are fixed."""
    studies: list[tuple[str, Protocol, Mapping[str, str], str]] = [
        ("SmolLM2-135M", LANGUAGE, {}, "language"),
        ("MGM", GRID, POSITIONS, "language"),
        ("DINOv2-small", VISION, {}, "vision"),
    ]
    found = []
    for model, protocol, names, kind in studies:
        rows = Rows(protocol.results / protocol.model)
        design = protocol.with_targets(Rows(rows.folder / "reference"))
        if design is not None:
            found.append(Source(model, Analysis(design, rows), names, kind))
    return found


def answers(studies: Iterable[Source]) -> dict[str, list[Found]]:
    """By question, its pairs in all studies where two seeds or more have both arms; only questions with such pairs."""
    found: dict[str, list[Found]] = {question: [] for question in QUESTIONS}
    for study in studies:
        claims = {(c.task, c.steps, c.place, c.arm, c.other): c for c in study.analysis.comparisons()}
        for question, pairs in QUESTIONS.items():
            for (task, steps), pair in product(study.analysis.design.targets, pairs):
                arm, other = (study.names.get(name, name) for name in pair)
                found[question] += _pair(study, claims, task, steps, arm, other)
    return {question: pairs for question, pairs in found.items() if pairs}


def _pair(study: Source, claims: Mapping[Key, Comparison], task: str, steps: int, arm: str, other: str) -> list[Found]:
    """The pair in one cell; empty with fewer than two seeds."""
    analysis, title = study.analysis, study.analysis.design.title
    if not (analysis.of(task, steps, arm) and analysis.of(task, steps, other)):
        return []
    keys = [(task, steps, place, arm, other) for place in range(3)]
    targets = tuple(claims.get(key) or analysis.compare(*key) for key in keys)
    if not any(c.ratio is not None and c.ratio.n > 1 for c in targets):
        return []
    otherwise = _otherwise(analysis, task, steps, arm, other)
    cell = f"{study.model}, {cell_title(analysis, task, steps)} steps"
    return [Found(cell, f"{title(arm)} / {title(other)}", targets, keys[0] in claims, study.kind, otherwise)]


def _otherwise(analysis: Analysis, task: str, steps: int, arm: str, other: str) -> dict[str, str]:
    """What one other choice each would give."""
    design, cell = analysis.design, (task, steps)
    stopped = stopped_text(analysis, *cell, 1, arm, other)
    texts = {name: f"kl_{name}" for name in design.kept if f"kl_{name}" != design.metric}
    there = [
        f"{design.title(name)} {ratio_text(analysis.compare(*cell, 1, arm, other, metric).ratio)}"
        for name, metric in texts.items()
    ]
    first = analysis.at_first_rates(*cell, 1, arm, other)
    hardest = analysis.compare(*cell, 2, arm, other, at=2).ratio
    words = (stopped, "; ".join(there), ratio_text(first), ratio_text(hardest))
    return dict(zip(CHOICES, words, strict=True))


def sections(found: Mapping[str, list[Found]]) -> dict[str, str]:
    """The text between the markers of the page, by marker."""
    place = PICTURE.relative_to(PAGE.parents[1]).as_posix()
    picture = f"![KL to the base at equal success, by question and model](../{place})"
    parts = [sentences(found), picture, table(found)]
    return {"ratios": "\n\n".join(parts) if found else NOT_RUN, "choices": choices(found) if found else NOT_RUN}


def sentences(found: Mapping[str, list[Found]]) -> str:
    """One line for each question: the cells by verdict."""
    lines = []
    for question, pairs in found.items():
        by_verdict: dict[str, list[str]] = {}
        for pair in pairs:
            said = pair.verdict if pair.is_decided or not pair.claimed else "no verdict"
            arm = f"{pair.arms.partition(' / ')[0]}, " if len(QUESTIONS[question]) > 1 else ""
            by_verdict.setdefault(said, []).append(f"{arm}{pair.cell}")
        told = " ".join(f"{'; '.join(dict.fromkeys(cells))} – {verdict}." for verdict, cells in by_verdict.items())
        lines.append(f"- **{question[0].upper()}{question[1:]}.** {told}")
    return "\n".join(lines)


def table(found: Mapping[str, list[Found]]) -> str:
    """The ratios at the three targets, with the verdict of each study's protocol."""
    rows = [[pair.arms, pair.cell, pair.n, *pair.ratios, pair.verdict] for pairs in found.values() for pair in pairs]
    return markdown(["ratio", "model, new task", "n", *(f"{name} target" for name in TARGETS), "verdict"], rows)


def choices(found: Mapping[str, list[Found]]) -> str:
    """The ratios at the middle target, and what they would be under other choices."""
    rows = [
        [pair.arms, pair.cell, ratio_text(pair.targets[1].ratio), *(pair.otherwise[name] for name in CHOICES)]
        for pairs in found.values()
        for pair in pairs
    ]
    return f"{markdown(['ratio', 'model, new task', 'as compared', *CHOICES], rows)}\n\n{STOPPED_NOTE}"


def draw(found: Mapping[str, list[Found]]) -> dict[Path, Figure]:
    """A panel for each question: ratios at the middle target with intervals, one line a pair."""
    if not found:
        return {}
    what = "KL to the base at equal success (middle target), 95 % intervals; below 1 the first of the two moved it less"
    note = f"{what}\nfilled: with a verdict by the protocol; hollow: without"
    high = 0.9 + 0.3 * max(map(len, found.values()))
    with sheet(-(-len(found) // 2), min(2, len(found)), note, wide=5.0, high=high) as (figure, axes):
        flat = list(axes.flat)
        for axis, (question, pairs) in zip(flat, found.items(), strict=False):
            _panel(axis, question, pairs)
        for axis in flat[len(found) :]:
            axis.remove()
    return {PICTURE: figure}


def _panel(axis: Axes, question: str, pairs: list[Found]) -> None:
    color = PALETTE[0]
    for line, pair in enumerate(pairs):
        ratio = pair.targets[1].ratio
        if ratio is not None:
            if ratio.low is not None and ratio.high is not None:
                axis.hlines(line, ratio.low, ratio.high, color=color, linewidth=1.3)
            face = color if pair.claimed and not pair.targets[1].obstacle else "white"
            axis.plot(ratio.value, line, "o", color=color, markerfacecolor=face, markersize=5)
    several = len(QUESTIONS[question]) > 1
    names = [f"{pair.arms.partition(' / ')[0]}\n{pair.cell}" if several else pair.cell for pair in pairs]
    axis.set_yticks(range(len(pairs)), names, fontsize=7)
    axis.set_ylim(len(pairs) - 0.5, -0.5)
    axis.axvline(1.0, color=INK, linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
    axis.set_xlim(min(0.4, *axis.get_xlim()), max(2.5, *axis.get_xlim()))
    axis.minorticks_off()
    axis.set_title(textwrap.fill(question, 36), fontsize=9)


def main() -> int:
    """Draw the picture and write the page, or check it; returns the exit status."""
    found = answers(sources())
    return update_page(PAGE, lambda: sections(found), "make study-page", __doc__, lambda: draw(found))


if __name__ == "__main__":
    sys.exit(main())
