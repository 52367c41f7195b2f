"""Sections of a study's page: pictures, tables and sentences from the rows at hand.

Below five seeds, or where a grid of rates is incomplete or its best rate is an edge, the page says so and draws no
verdict. The sentences follow from the numbers by the rules of the protocol.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from studies.frontier.analysis import Analysis, Comparison, Ratio, base, final, spread
from studies.frontier.design import RATES, best_rate
from studies.frontier.positions import best_positions, profile, shapes
from studies.frontier.protocol import Protocol
from studies.frontier.rows import Rows
from studies.page import markdown, update_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGES = Path(__file__).resolve().parents[2] / "docs" / "results"
NOT_RUN = "Not run."
TARGETS = ("easiest", "middle", "hardest")
EARLY, AT_EDGE = "†", "‡"
STOPPED_NOTE = (
    f"{EARLY} More than half of these runs reach the target before their first checkpoint, at a quarter of the steps. "
    "There the curve rests on the base and that checkpoint, and nothing checks the interpolation. "
    f"{AT_EDGE} A rate that is best for stopping is the lowest or the highest that was tried: another may be better."
)


def write_page(
    protocol: Protocol,
    page: str,
    make: Callable[[Analysis, Path], Mapping[str, str]],
    doc: str | None,
    draw: Sequence[Callable[[Analysis, Path], Mapping[Path, Figure]]],
) -> int:
    """Command-line entry point of a study's page: draw its pictures and write it, or check it; the exit status.

    Args:
        page: its file in :data:`PAGES`.
        make: makes its sections, from the rows and the folder of the pictures.
        doc: description of the command.
        draw: each draws pictures of that folder.
    """
    folder = protocol.results / protocol.model
    analysis = Analysis(protocol.with_targets(Rows(folder / "reference")) or protocol.plan, Rows(folder))

    def pictures() -> dict[Path, Figure]:
        return {path: figure for each in draw for path, figure in each(analysis, folder).items()}

    return update_page(PAGES / page, lambda: make(analysis, folder), "make study-page", doc, pictures)


def sections(analysis: Analysis, folder: Path) -> dict[str, str]:
    """The text between the markers of a language model's page, by marker; the pictures are in ``folder``."""
    return {**shared_sections(analysis, folder), "tuned": tuned_table(analysis), "kept": kept_table(analysis)}


def shared_sections(analysis: Analysis, folder: Path) -> dict[str, str]:
    """What the pages of all models have."""
    found = analysis.comparisons()
    findings = "\n".join(f"- {sentence}" for sentence in (*sentences(analysis, found), *rate_sentences(analysis)))
    marked = f"\n\n{STOPPED_NOTE}" if EARLY in findings or AT_EDGE in findings else ""
    return {
        "progress": progress(analysis),
        "findings": f"{findings}{marked}" or NOT_RUN,
        "frontier": picture(analysis, folder, "frontier"),
        "comparisons": comparisons_table(analysis, found),
        "targets": targets_table(analysis),
        "training": training_table(analysis),
        "rates": f"{picture(analysis, folder, 'rates')}\n\n{rates_table(analysis)}".strip(),
        "checks": checks(analysis),
    }


def progress(analysis: Analysis) -> str:
    """How many runs there are, and of which machines and versions."""
    runs = analysis.runs
    if not runs:
        return NOT_RUN
    rows = []
    for task, steps in analysis.design.targets:
        for arm in analysis.design.arms:
            found = analysis.of(task, steps, arm)
            if found:
                seeds = {rate: sum(run.rate == rate for run in found) for rate in sorted({run.rate for run in found})}
                each = ", ".join(f"{rate:g}: {count}" for rate, count in seeds.items())
                rows.append([cell_title(analysis, task, steps), analysis.design.title(arm), each])
    diverged = sum(any(line["status"] != "ok" for line in lines) for lines in runs.values())
    made = {tuple(f"{k} {v}" for k, v in lines[0]["environment"].items() if k != "cores") for lines in runs.values()}
    environments = "; ".join(sorted(", ".join(one) for one in made))
    head = f"{len(runs)} runs, {diverged} of them diverged. Made with: {environments}."
    return f"{head}\n\n{markdown(['new task, steps', 'arm', 'seeds at each rate'], rows)}"


def sentences(analysis: Analysis, comparisons: list[Comparison]) -> Iterator[str]:
    """One sentence for each new task, length and pair, with a verdict on each target that has one."""
    title = analysis.design.title
    for task, steps in analysis.design.targets:
        for arm, other in _pairs(analysis):
            found = [c for c in comparisons if (c.task, c.steps, c.arm, c.other) == (task, steps, arm, other)]
            if any(c.ratio for c in found):
                stopped = [stopped_text(analysis, task, steps, place, arm, other) for place in range(3)]
                along = f"Stopped at the target instead of scaled: {', '.join(stopped)}."
                head = f"{cell_title(analysis, task, steps)} steps, {title(arm)} against {title(other)}"
                yield f"{head} – {_says(found)} {along}"


def _says(found: list[Comparison]) -> str:
    """A verdict on the three targets, or why there is none."""
    obstacles = list(dict.fromkeys(c.obstacle for c in found if c.obstacle))
    ratios = ", ".join(ratio_text(c.ratio) for c in found)
    if all(c.obstacle for c in found):
        return f"no verdict ({'; '.join(obstacles)}). Ratios at hand {ratios}."
    return f"{by_target([c.words for c in found])}. Ratios {ratios}."


def by_target(words: Sequence[str]) -> str:
    """``"easiest and middle target: lower; hardest target: not shown"``, or the word that holds at all three."""
    places = {word: [name for name, each in zip(TARGETS, words, strict=True) if each == word] for word in words}
    if len(places) == 1:
        return f"{words[0]} at all three targets"
    return "; ".join(f"{' and '.join(names)} target: {word}" for word, names in places.items())


def comparisons_table(analysis: Analysis, comparisons: list[Comparison]) -> str:
    """The primary comparisons."""
    title = analysis.design.title
    rows = [
        [
            cell_title(analysis, c.task, c.steps),
            TARGETS[c.place],
            title(c.arm),
            title(c.other),
            str(c.ratio.n),
            ratio_text(c.ratio),
            "–" if c.obstacle else p_text(c.ratio.p),
            p_text(c.adjusted),
            c.words,
        ]
        for c in comparisons
        if c.ratio is not None
    ]
    head = ["new task, steps", "target", "arm", "against", "n", "ratio of KL [95 %]", "p", "adjusted p", "verdict"]
    return markdown(head, rows) if rows else NOT_RUN


def shape_sentences(analysis: Analysis) -> Iterator[str]:
    """One sentence for each new task and length on the shape over positions, from the easiest target on."""
    found = shapes(analysis)
    for task, steps in analysis.design.targets:
        verdicts = [shape.verdict for shape in found if (shape.left.task, shape.left.steps) == (task, steps)]
        if profile(analysis, task, steps, 1):
            words = verdicts[0] if len(set(verdicts)) == 1 else "; ".join(verdicts)
            yield f"{cell_title(analysis, task, steps)} steps: {words}."


def shapes_table(analysis: Analysis) -> str:
    """The two lines: the divergence at an end over that at the middle."""
    rows = []
    for shape in shapes(analysis):
        if shape.left.ratio or shape.right.ratio:
            sides = [f"{ratio_text(c.ratio)}, {p_text(c.adjusted)}" for c in (shape.left, shape.right)]
            cell = cell_title(analysis, shape.left.task, shape.left.steps)
            n = str(max(c.ratio.n if c.ratio else 0 for c in (shape.left, shape.right)))
            rows.append([cell, TARGETS[shape.left.place], n, *sides, shape.verdict])
    head = ["new task, steps", "target", "n", "end 0 / middle [95 %], adjusted p", "end 1 / middle", "verdict"]
    return markdown(head, rows) if rows else NOT_RUN


def positions_table(analysis: Analysis) -> str:
    """Each position's divergence over the middle's at the three targets; once all are tuned, where it is lowest."""
    rows, lowest = [], []
    for task, steps in analysis.design.targets:
        by_place = [profile(analysis, task, steps, place) for place in range(3)]
        for arm, at in analysis.design.positions.items():
            if any(arm in found for found in by_place):
                ratios = [f"{ratio_text(found.get(arm))} ({found[arm].n if arm in found else 0})" for found in by_place]
                tried = len(analysis.scores(task, steps, arm, 1))
                rates = f"{tried}, not tuned" if analysis.untuned(task, steps, arm) else f"{tried}"
                rows.append([cell_title(analysis, task, steps), f"{at:g}", rates, *ratios])
        best = best_positions(analysis, task, steps, 1)
        if best is not None:
            near = ", ".join(best[1])
            where = f"lowest at {best[0]}; not shown to be higher: {near}"
            lowest.append(f"- {cell_title(analysis, task, steps)} steps, middle target: {where}.")
    head = ["new task, steps", "position", "rates tried", *(f"{name} target" for name in TARGETS)]
    return "\n".join([markdown(head, rows), "", *lowest]).strip() if rows else NOT_RUN


def targets_table(analysis: Analysis) -> str:
    """KL on the base's samples at the three targets, of every arm, each seed at the rate best on the other seeds."""
    rows = []
    for (task, steps), _targets in analysis.design.targets.items():
        for arm in analysis.design.arms:
            if analysis.of(task, steps, arm):
                by_place = [analysis.tuned(task, steps, arm, place) for place in range(3)]
                cells = [_mean_of(found.values()) for found in by_place]
                rates = _rates_text(analysis.rates(task, steps, arm))
                rows.append([cell_title(analysis, task, steps), analysis.design.title(arm), rates, *cells])
    head = ["new task, steps", "arm", "rate", *(f"{name} target" for name in TARGETS)]
    named = "; ".join(
        f"{cell_title(analysis, task, steps)} steps: {', '.join(f'{t:g}' for t in targets)}"
        for (task, steps), targets in analysis.design.targets.items()
    )
    return f"{markdown(head, rows)}\n\nTargets, nats {analysis.design.unit}: {named}." if rows else NOT_RUN


def training_table(analysis: Analysis) -> str:
    """The same comparison along training instead of the scale: the checkpoint at which the target is reached."""
    rows, cells = [], set(analysis.design.cells())
    for task, steps in analysis.design.targets:
        for arm, other in _pairs(analysis):
            if {(task, steps, arm), (task, steps, other)} <= cells:
                found = [stopped_text(analysis, task, steps, place, arm, other, seeds=True) for place in range(3)]
                if set(found) != {"–"}:
                    names = map(analysis.design.title, (arm, other))
                    rates = " / ".join(_rates_text(analysis.rates(task, steps, e, training=True)) for e in (arm, other))
                    rows.append([cell_title(analysis, task, steps), *names, rates, *found])
    head = ["new task, steps", "arm", "against", "rates", *(f"{name} target" for name in TARGETS)]
    return f"{markdown(head, rows)}\n\n{STOPPED_NOTE}" if rows else NOT_RUN


def stopped_text(
    analysis: Analysis, task: str, steps: int, place: int, arm: str, other: str, *, seeds: bool = False
) -> str:
    """The ratio of runs that are stopped at a target, marked as :data:`STOPPED_NOTE` says; with its n for ``seeds``."""
    ratio = analysis.compare(task, steps, place, arm, other, training=True).ratio
    if ratio is None:
        return "–"
    mark = EARLY if analysis.is_early(task, steps, place, arm, other) else ""
    mark += AT_EDGE if analysis.stops_at_edge(task, steps, arm, other) else ""
    return f"{ratio_text(ratio)}{mark}" + (f", n = {ratio.n}" if seeds else "")


def _rates_text(chosen: Mapping[int, float]) -> str:
    """The rates that seeds are taken at."""
    return ", ".join(f"{rate:g}" for rate in sorted(set(chosen.values())))


def tuned_table(analysis: Analysis) -> str:
    """The model at λ = 1, at the lowest rate within one standard error of the best cross-entropy."""
    rows = []
    for task, steps in analysis.design.targets:
        for arm in analysis.design.arms:
            found = analysis.one_standard_error(task, steps, arm)
            if found is not None:
                rate, mark = found
                chosen = [run for run in analysis.of(task, steps, arm) if run.rate == rate]
                metrics = ("ce_new", *(f"kl_{name}" for name in analysis.design.kept))
                means = [mean(final(analysis.runs[run], metric) for run in chosen) for metric in metrics]
                at = f"{rate:g} ({mark})" if mark else f"{rate:g}"
                cells = [at, str(len(chosen)), f"{means[0]:.3f}", *(f"{value:#.3g}" for value in means[1:])]
                rows.append([cell_title(analysis, task, steps), analysis.design.title(arm), *cells])
    kept = [f"KL, {analysis.design.title(name)}" for name in analysis.design.kept]
    head = ["new task, steps", "arm", "rate", "n", "CE, new task", *kept]
    return markdown(head, rows) if rows else NOT_RUN


def rates_table(analysis: Analysis) -> str:
    """How far the rate moves the frontier: highest over lowest KL at the middle target."""
    rows = []
    for task, steps in analysis.design.targets:
        for arm in analysis.design.arms:
            scores = dict(sorted(analysis.scores(task, steps, arm, 1).items()))
            if len(scores) > 1:
                counts = {rate: [score is not None for score in by_seed.values()] for rate, by_seed in scores.items()}
                reached = ", ".join(f"{rate:g}" for rate, each in counts.items() if all(each))
                missed = ", ".join(
                    f"{rate:g} ({sum(each)} of {len(each)})" for rate, each in counts.items() if not all(each)
                )
                found = spread(scores)
                ratio = "–" if found is None else f"{found:.2f}"
                names = [cell_title(analysis, task, steps), analysis.design.title(arm)]
                rows.append([*names, reached or "–", missed or "–", ratio])
    reach = ["rates at which every seed reaches the target", "other rates (seeds that reach it)"]
    if analysis.runs and not rows:
        return "No arm has two rates yet."
    return markdown(["new task, steps", "arm", *reach, "highest / lowest KL"], rows) if rows else NOT_RUN


def rate_sentences(analysis: Analysis) -> Iterator[str]:
    """One sentence for each new task and length on the claim that high rates do the middle window no harm along λ."""
    for found in analysis.rate_claims():
        said = found.verdict or f"no verdict ({found.why})"
        yield (
            f'{cell_title(analysis, found.task, found.steps)} steps, "high rates do no harm along λ" – {said}. Highest '
            f"over lowest KL among the rates that reach the middle target with every seed: {found.middle:.2f}, plain "
            f"LoRA's {found.lora:.2f}."
        )


def kept_table(analysis: Analysis) -> str:
    """At the middle target: KL and the rise of the cross-entropy on each kept text."""
    rows, names = [], analysis.design.kept
    for task, steps in analysis.design.targets:
        for arm in analysis.design.arms:
            runs = analysis.of(task, steps, arm)
            if runs:
                known = {name: base(analysis.runs[runs[0]], f"ce_{name}") for name in names}
                divergences = [analysis.tuned(task, steps, arm, 1, f"kl_{name}").values() for name in names]
                entropies = [
                    [None if value is None else value - known[name] for value in found.values()]
                    for name in names
                    for found in [analysis.tuned(task, steps, arm, 1, f"ce_{name}")]
                ]
                cells = [*map(_mean_of, divergences), *(_mean_of(found, sign=True) for found in entropies)]
                rows.append([cell_title(analysis, task, steps), analysis.design.title(arm), *cells])
    first, *others = map(analysis.design.title, names)
    head = ["new task, steps", "arm", f"KL: {first}", *others, f"CE rise: {first}", *others]
    return markdown(head, rows) if rows else NOT_RUN


def checks(analysis: Analysis) -> str:
    """What the interpolation and the finite texts contribute to the error."""
    lines, design = list(_grid_steps(analysis)), analysis.design
    kept = f"KL on the {design.title(design.metric.removeprefix('kl_'))}"
    for metric, name in (("ce_new", "the cross-entropy on the new task"), (design.metric, kept)):
        found = analysis.interpolation_error(metric)
        if found is not None:
            lines.append(f"- Interpolation of {name} over λ: at {found[0]} finer points off by at most {found[1]:.1%}.")
    for metric, name in (("ce_new", "cross-entropy on the new task"), (design.metric, kept)):
        errors = [
            (error, final(measured, metric))
            for run, measured in analysis.runs.items()
            if (error := analysis.item_error(run, metric)) is not None
        ]
        if errors:
            share = mean(error / value for error, value in errors)
            lines.append(
                f"- Standard error over the held-out {design.item} of the {name} at λ = 1: {share:.1%} of it on "
                f"average. All arms share the {design.item}, so that it largely cancels in a ratio; it does not cancel "
                "in a claim about others."
            )
    return "\n".join(lines) or NOT_RUN


def _grid_steps(analysis: Analysis) -> Iterator[str]:
    """How much one step of the grid of rates changes the metric, by new task and length, over the tuned arms."""
    for task, steps in analysis.design.targets:
        changes, lowest = [], 0
        for arm in analysis.design.arms:
            scores = analysis.scores(task, steps, arm, 1)
            if scores and not analysis.untuned(task, steps, arm):
                means = {
                    RATES.index(rate): mean(score for score in by_seed.values() if score is not None)
                    for rate, by_seed in scores.items()
                    if None not in by_seed.values()
                }
                best = RATES.index(best_rate(scores))
                around = [means[place] for place in (best - 1, best + 1) if place in means]
                if best in means and around:
                    changes.append(min(around) / means[best] - 1)
                    lowest += best - 1 not in means
        if changes:
            yield (
                f"- {cell_title(analysis, task, steps)} steps, middle target: from an arm's best rate to its better "
                f"neighbor in the grid the mean changes by {min(changes):.0%} to {max(changes):.0%} "
                f"({len(changes)} arms; with {lowest} of them, the next lower rate misses the target). Best rates are "
                "known to one such step only, so that ratios within it may be due to the grid."
            )


def cell_title(analysis: Analysis, task: str, steps: int) -> str:
    """``German manual pages, 60``."""
    return f"{analysis.design.title(task)}, {steps}"


def _pairs(analysis: Analysis) -> list[tuple[str, str]]:
    return list(dict.fromkeys(pair for pairs in analysis.design.families for pair in pairs))


def picture(analysis: Analysis, folder: Path, name: str) -> str:
    """The picture ``name`` of ``folder``, in Markdown; nothing without runs."""
    if not analysis.runs:
        return ""
    return f"![{name}](../../{(folder / f'{name}.png').relative_to(PAGES.parents[1]).as_posix()})"


def ratio_text(found: Ratio | None) -> str:
    """``0.70 [0.60, 0.80]``."""
    if found is None:
        return "–"
    return f"{found.value:.2f}" if found.low is None else f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _mean_of(values: Iterable[float | None], *, sign: bool = False) -> str:
    """``0.123 (5)``, a mean with its n; ``0.123 (3 of 5)`` where not every run reaches the target."""
    found = list(values)
    reached = [value for value in found if value is not None]
    if not reached:
        return f"– (0 of {len(found)})"
    count = str(len(found)) if len(reached) == len(found) else f"{len(reached)} of {len(found)}"
    return f"{mean(reached):{'+.3f' if sign else '#.3g'}} ({count})".replace("-", "−")


def p_text(value: float) -> str:
    """A p-value to three digits."""
    if math.isnan(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
