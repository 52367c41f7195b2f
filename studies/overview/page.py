"""The studies that compare at equal success, side by side: the chart and the table of docs/choosing-a-window.md.

python -m studies.overview.page [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ipca.analysis.figures import INK, PALETTE
from studies.frontier.analysis import Analysis, Comparison
from studies.frontier.page import NOT_RUN, cell_title, ratio_text
from studies.frontier.protocol import Protocol
from studies.frontier.rows import Rows
from studies.language.protocol import PROTOCOL as LANGUAGE
from studies.page import markdown, update_page
from studies.plots import sheet
from studies.position_grid.protocol import PROTOCOL as GRID
from studies.vision.protocol import PROTOCOL as VISION

PAGE = Path(__file__).resolve().parents[2] / "docs" / "choosing-a-window.md"
PICTURE = Path(__file__).resolve().parent / "results" / "ratios.png"
QUESTIONS = {
    "middle window against plain LoRA": (("middle", "lora"),),
    "middle window against the principal": (("middle", "principal"),),
    "middle window against the minor": (("middle", "minor"),),
    "middle window with a frozen factor against plain LoRA": (("frozen-A", "lora"), ("frozen-B", "lora")),
    "directions of inputs against plain LoRA": (("inputs-minor", "lora"), ("inputs-principal", "lora")),
    "full fine-tuning against plain LoRA": (("full", "lora"),),
}
"""Pairs of arms by what they are to answer."""
POSITIONS = {"middle": "0.5", "principal": "0.0", "minor": "1.0"}
"""Names of the same arms in the study of positions."""
_WORDS = {"lower": "moves the model less", "higher": "moves it more"}


@dataclass(frozen=True)
class Source:
    """A study's rows.

    Attributes:
        model: for tables and the chart.
        analysis: of its rows.
        names: its names of arms, where they differ.
    """

    model: str
    analysis: Analysis
    names: Mapping[str, str]


@dataclass(frozen=True)
class Found:
    """A pair of arms in one study, for one new task and length.

    Attributes:
        cell: model, new task and steps.
        arms: titles of the two.
        targets: the comparisons at the three targets, the easiest first.
        claimed: whether the protocol has a claim about the pair; otherwise there is no verdict.
    """

    cell: str
    arms: str
    targets: tuple[Comparison, ...]
    claimed: bool

    @property
    def is_decided(self) -> bool:
        """Whether there is a verdict at each target."""
        return self.claimed and not any(c.obstacle for c in self.targets)

    @property
    def verdict(self) -> str:
        """The verdict at the three targets, or why there is none."""
        if not self.claimed:
            return "described only"
        if not self.is_decided:
            return "; ".join(dict.fromkeys(c.obstacle for c in self.targets if c.obstacle))
        words = [_WORDS.get(c.verdict, c.verdict) for c in self.targets]
        return words[0] if len(set(words)) == 1 else ", ".join(words)


def sources() -> list[Source]:
    """The studies whose targets are fixed."""
    studies: list[tuple[str, Protocol, Mapping[str, str]]] = [
        ("SmolLM2-135M", LANGUAGE, {}),
        ("MGM", GRID, POSITIONS),
        ("DINOv2-small", VISION, {}),
    ]
    found = []
    for model, protocol, names in studies:
        rows = Rows(protocol.results / protocol.model)
        design = protocol.with_targets(Rows(rows.folder / "reference"))
        if design is not None:
            found.append(Source(model, Analysis(design, rows), names))
    return found


def answers(question: str, studies: list[Source]) -> Iterator[Found]:
    """The pairs of a question in all studies, where two seeds or more have both arms."""
    for study in studies:
        analysis, title = study.analysis, study.analysis.design.title
        claims = {(c.task, c.steps, c.place, c.arm, c.other): c for c in analysis.comparisons()}
        for task, steps in analysis.design.targets:
            for pair in QUESTIONS[question]:
                arm, other = (study.names.get(name, name) for name in pair)
                if not (analysis.of(task, steps, arm) and analysis.of(task, steps, other)):
                    continue
                keys = [(task, steps, place, arm, other) for place in range(3)]
                targets = tuple(claims.get(key) or analysis.compare(*key) for key in keys)
                if any(c.ratio is not None and c.ratio.n > 1 for c in targets):
                    cell = f"{study.model}, {cell_title(analysis, task, steps)} steps"
                    yield Found(cell, f"{title(arm)} / {title(other)}", targets, keys[0] in claims)


def table(studies: list[Source]) -> str:
    """The ratios at the three targets, with the verdict of each study's protocol."""
    rows = [
        [found.arms, found.cell, str(_n(found)), *(ratio_text(c.ratio) for c in found.targets), found.verdict]
        for question in QUESTIONS
        for found in answers(question, studies)
    ]
    head = ["ratio", "model, new task", "n", "easiest target", "middle target", "hardest target", "verdict"]
    return markdown(head, rows) if rows else NOT_RUN


def sentences(studies: list[Source]) -> str:
    """One line for each question: the cells by verdict."""
    lines = []
    for question in QUESTIONS:
        by_verdict: dict[str, list[str]] = {}
        for found in answers(question, studies):
            verdict = found.verdict if found.is_decided else "no verdict yet"
            by_verdict.setdefault(verdict, []).append(found.cell)
        if by_verdict:
            told = ", ".join(f"{verdict} ({'; '.join(dict.fromkeys(cells))})" for verdict, cells in by_verdict.items())
            lines.append(f"- {question[0].upper()}{question[1:]}: {told}.")
    return "\n".join(lines) or NOT_RUN


def draw(studies: list[Source], path: Path) -> None:
    """A panel for each question with answers: ratios at the middle target with intervals, one line a cell."""
    panels = {question: list(answers(question, studies)) for question in QUESTIONS}
    panels = {question: found for question, found in panels.items() if found}
    if not panels:
        return
    what = "KL to the base at equal success (middle target), 95 % intervals"
    note = f"{what}\nfilled: with a verdict by the protocol; hollow: without"
    tallest = max(map(len, panels.values()))
    with sheet(-(-len(panels) // 2), min(2, len(panels)), note, wide=5.0, high=0.9 + 0.3 * tallest) as (figure, axes):
        flat = list(axes.flat)
        for axis, (question, cells) in zip(flat, panels.items(), strict=False):
            for line, found in enumerate(cells):
                ratio = found.targets[1].ratio
                if ratio is None:
                    continue
                if ratio.low is not None and ratio.high is not None:
                    axis.hlines(line, ratio.low, ratio.high, color=PALETTE[0], linewidth=1.3)
                face = PALETTE[0] if found.is_decided else "white"
                axis.plot(ratio.value, line, "o", color=PALETTE[0], markerfacecolor=face, markersize=5)
            several = len(QUESTIONS[question]) > 1
            names = [f"{found.arms.partition(' / ')[0]}\n{found.cell}" if several else found.cell for found in cells]
            axis.set_yticks(range(len(cells)), names, fontsize=7)
            axis.set_ylim(len(cells) - 0.5, -0.5)
            axis.axvline(1.0, color=INK, linewidth=0.8)
            axis.set_xscale("log")
            ticks = (0.25, 0.5, 1.0, 2.0, 4.0)
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.set_xlim(0.3, 3.3)
            axis.minorticks_off()
            axis.set_title(question)
        for axis in flat[len(panels) :]:
            axis.remove()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def sections(studies: list[Source]) -> dict[str, str]:
    """The text between the markers of the page, by marker."""
    shown = any(True for question in QUESTIONS for _ in answers(question, studies))
    picture = f"![ratios](../{PICTURE.relative_to(PAGE.parents[1]).as_posix()})"
    return {"ratios": "\n\n".join([sentences(studies), picture, table(studies)]) if shown else NOT_RUN}


def _n(found: Found) -> int:
    return max(c.ratio.n for c in found.targets if c.ratio is not None)


def main() -> int:
    """Draw the picture and write the page, or check it; returns the exit status."""
    studies = sources()
    if "--check" not in sys.argv:
        draw(studies, PICTURE)
    return update_page(PAGE, lambda: sections(studies), "make study-page", __doc__)


if __name__ == "__main__":
    sys.exit(main())
