"""What the paper reports, claim by claim and model by model: docs/results/paper.md.

python -m studies.overview.paper [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from studies.continual.analysis import Analysis as Continual
from studies.continual.page import NAMES as METHODS
from studies.continual.page import mean_text, signed_text
from studies.continual.rows import Rows as Streams
from studies.frontier.page import NOT_RUN, by_target, cell_title, ratio_text
from studies.frontier.positions import shapes
from studies.overview.page import Found, Source, answers, sources
from studies.page import markdown, update_page
from studies.window_position.reanalysis import EDGE, HOLDS, NOT_SHOWN, REVERSED
from studies.window_position.rows import LORA, MINOR, PRINCIPAL, RATE, Study
from studies.window_position.rules import Tables, read_tables
from studies.window_position.tables import PLACE_NAMES
from studies.window_position.words import estimate_cell

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "paper.md"
EQUAL, ONE_RATE = "forget less, at equal success", f"forget less, at one rate ({RATE:g})"
HIGH, ACCURACY = "lose less from the lowest rate to the highest", "learn more, each at its best rate"
TUNED = "retain more, each at its best rate"
CONTINUAL, ONE_STREAM = "end higher after five tasks", "end higher after five tasks, at one rate"
KEPT = "keep more of what pretraining taught, after five tasks"
RATES = "lose no more to high rates, at equal success"
SHAPE = "forget least of all positions: a U over the spectrum, at equal success"
ALIKE, MIXED, NO_VERDICT = "alike", "depends on the target", "no verdict"
REFUTED, NOT_REFUTED = "refuted", "not refuted"
REACHED = " where reached"
"""After a word: of the targets that all arms reach with enough seeds; not of all three."""
_AGAINST = {"the first (principal)": PRINCIPAL, "the last (minor)": MINOR, "plain LoRA": LORA}
_QUESTIONS = dict(zip(_AGAINST, ("the principal one", "the minor one", "plain LoRA"), strict=True))
_SWEEPS = {EQUAL: "equal target", ONE_RATE: "same rate", HIGH: "high rates", ACCURACY: "accuracy"}
"""The names of ``claims.csv``."""
_VERDICTS = {"lower": HOLDS, "higher": REVERSED, "equivalent": ALIKE, NOT_SHOWN: NOT_SHOWN}
_STREAMS = {"higher": HOLDS, "lower": REVERSED, "alike": ALIKE, "not shown": NOT_SHOWN}
_FIXED = {"C6": "MiniLM feed-forward", "C11": "ViT"}
"""Tests of the window study's protocol at best-tuned rates, against plain LoRA."""
_SUPPORT = {"C6": "S6"}
"""Added comparisons, at one rate, that a verdict needs too; on the ViT every seed's best rate is that one."""
_SIDES = {"above": HOLDS, "below": REVERSED}
_WORDS = (*_VERDICTS.values(), REFUTED, NOT_REFUTED)
_ORDER = (*(f"{word}{part}" for word in _WORDS for part in ("", REACHED)), MIXED, NO_VERDICT)
_KINDS = ("language", "vision")


@dataclass(frozen=True)
class Result:
    """One claim on one model.

    Attributes:
        claim: what intermediate components are said to do.
        against: in comparison with what.
        kind: ``"language"`` or ``"vision"``.
        model: with its task or layers.
        n: seeds.
        figure: the difference or ratio with its interval.
        verdict: one of the words of the page.
        why: the reason where there is no verdict.
    """

    claim: str
    against: str
    kind: str
    model: str
    n: str
    figure: str
    verdict: str
    why: str = ""


def results(tables: Tables, studies: Iterable[Source], streams: Continual) -> list[Result]:
    """All results, by claim, then by what the windows are compared with."""
    studies = list(studies)
    found = [*_of_sweeps(tables), *_of_tests(tables), *_of_frontiers(studies), *_of_shapes(studies)]
    found += [*_of_rates(studies), *_of_streams(tables, streams)]
    claims = [EQUAL, SHAPE, TUNED, ONE_RATE, HIGH, RATES, ACCURACY, CONTINUAL, ONE_STREAM, KEPT]
    against = [*_AGAINST, *dict.fromkeys(each.against for each in found)]
    return sorted(found, key=lambda each: (claims.index(each.claim), against.index(each.against)))


def _of_sweeps(tables: Tables) -> Iterator[Result]:
    """The window study: MiniLM and the small ViT. Positive differences speak for the claim."""
    for (claim, name), (against, method) in product(_SWEEPS.items(), _AGAINST.items()):
        for place, title in PLACE_NAMES.items():
            row = tables.claims.get((name, method, place))
            if row is not None:
                kind = "vision" if place.startswith("V") else "language"
                verdict, why = row["verdict"], ""
                if verdict == EDGE:
                    verdict, why = NO_VERDICT, "a best rate, or one that the comparison rests on, is an edge"
                elif verdict == NOT_SHOWN and row["p"] == row["smallest"]:
                    why = "p at its floor, too few seeds"
                measured = "accuracy on the new task" if claim == ACCURACY else "retained accuracy"
                figure = f"{measured} {estimate_cell(row, sign=True)}" if row["mean"] else "–"
                yield Result(claim, against, kind, title, row["n"] or "–", figure, verdict, why)


def _of_tests(tables: Tables) -> Iterator[Result]:
    """The window study's tests against plain LoRA that were fixed beforehand, at best-tuned rates."""
    for name, title in _FIXED.items():
        if name in tables.tests:
            row, why = tables.tests[name], f"{name}, fixed beforehand, corrected"
            verdict = _SIDES.get(row["verdict"], NOT_SHOWN)
            other = tables.tests.get(_SUPPORT.get(name, ""))
            if other is not None and _SIDES.get(other["verdict"], NOT_SHOWN) != verdict:
                verdict, why = NOT_SHOWN, f"{why}, says {verdict}; {_SUPPORT[name]}, at one rate, does not"
            kind = "vision" if name == "C11" else "language"
            figure = f"retained accuracy {estimate_cell(row, sign=True)}"
            yield Result(TUNED, "plain LoRA", kind, title, row["n"], figure, verdict, why)


def _of_frontiers(studies: Iterable[Source]) -> Iterator[Result]:
    """The studies at equal success: ratios of KL at the middle target; below 1 they speak for the claim."""
    found = answers(studies)
    for against, question in _QUESTIONS.items():
        for pair in found.get(f"middle window against {question}", []):
            verdict, why = _verdict(pair)
            model, _, task = pair.cell.partition(", ")
            figure = f"KL × {ratio_text(pair.targets[1].ratio)}"
            yield Result(EQUAL, against, pair.kind, f"{model} ({task})", pair.n, figure, verdict, why)


def _verdict(pair: Found) -> tuple[str, str]:
    """The word for the three targets, and why there is none."""
    if not pair.is_decided:
        return NO_VERDICT, pair.verdict
    if len(pair.decided) > 1:
        return MIXED, pair.verdict
    word = _VERDICTS[pair.decided.pop()]
    return (f"{word}{REACHED}", pair.verdict) if any(c.obstacle for c in pair.targets) else (word, "")


def _of_shapes(studies: Iterable[Source]) -> Iterator[Result]:
    """The studies of many positions: on each side of the middle a line, read at its end, over the middle."""
    for study in studies:
        design = study.analysis.design
        found = shapes(study.analysis) if design.claims_shape else []
        for task, steps in design.targets:
            targets = [each for each in found if (each.left.task, each.left.steps) == (task, steps)]
            if not any(each.left.ratio and each.right.ratio for each in targets):
                continue
            decided = [each.outcome for each in targets if each.outcome]
            word = MIXED if decided else NO_VERDICT
            if len(set(decided)) == 1:
                word = decided[0] + (REACHED if len(decided) < len(targets) else "")
            words = [each.verdict for each in targets]
            middle = targets[1]
            n = str(middle.left.ratio.n if middle.left.ratio else 0)
            figure = f"KL of the ends × {ratio_text(middle.left.ratio)} and {ratio_text(middle.right.ratio)}"
            model = f"{study.model} ({cell_title(study.analysis, task, steps)} steps)"
            yield Result(SHAPE, "both ends", study.kind, model, n, figure, word, by_target(words))


def _of_rates(studies: Iterable[Source]) -> Iterator[Result]:
    """The spread of KL over rates at equal success."""
    for study in studies:
        for found in study.analysis.rate_claims():
            figure = f"highest / lowest KL {found.middle:.2f}, plain LoRA's {found.lora:.2f}"
            model = f"{study.model} ({cell_title(study.analysis, found.task, found.steps)} steps)"
            word = found.verdict or NO_VERDICT
            yield Result(RATES, "plain LoRA", study.kind, model, str(found.n), figure, word, found.why)


def _of_streams(tables: Tables, streams: Continual) -> Iterator[Result]:
    """Tasks in a row: differences of the accuracy over all tasks, and over what was known; positive: for the claim."""
    for each in streams.compared():
        verdict, why = _STREAMS.get(each.verdict, NO_VERDICT), each.why
        if verdict == ALIKE and each.direction:
            why = f"within one point, though shown to be {each.direction}"
        against, n = METHODS[each.method], str(each.n)
        yield Result(CONTINUAL, against, "vision", "ViT", n, f"accuracy {mean_text(each)}", verdict, why)
        figure = f"accuracy on digits {signed_text(*streams.difference(each.method, 'retained_after'))}"
        yield Result(KEPT, against, "vision", "ViT", n, figure, NO_VERDICT, "described only, at the rates above")
    for (claim, method, _place), row in tables.claims.items():
        if claim == "continual":
            figure, why = f"accuracy {estimate_cell(row, sign=True)}", "a rate that was tuned for none"
            yield Result(ONE_STREAM, METHODS[method], "vision", "ViT", row["n"], figure, row["verdict"], why)


def sections(found: list[Result]) -> dict[str, str]:
    """The text between the markers of the page, by marker."""
    return {"short": short(found) if found else NOT_RUN, "results": table(found) if found else NOT_RUN}


def short(found: list[Result]) -> str:
    """A row for each claim and comparison: the models by verdict."""
    rows = []
    for claim, against in dict.fromkeys((each.claim, each.against) for each in found):
        of = [each for each in found if (each.claim, each.against) == (claim, against)]
        rows.append([claim, against, *(_by_verdict([each for each in of if each.kind == kind]) for kind in _KINDS)])
    return markdown(["intermediate components", "compared with", *_KINDS], rows)


def _by_verdict(found: list[Result]) -> str:
    groups = {word: [each.model for each in found if each.verdict == word] for word in _ORDER}
    return "; ".join(f"**{word}**: {', '.join(models)}" for word, models in groups.items() if models) or "–"


def table(found: list[Result]) -> str:
    """Every result with its figure."""
    head = ["intermediate components", "compared with", "model", "n", "middle window, 95 % interval", "verdict"]
    rows = []
    for each in found:
        verdict = f"{each.verdict} ({each.why})" if each.why else each.verdict
        rows.append([each.claim, each.against, each.model, each.n, each.figure, verdict])
    return markdown(head, rows)


def main() -> int:
    """Write the page, or check it; returns the exit status."""
    found = results(read_tables(Study()), sources(), Continual(Streams()))
    return update_page(PAGE, lambda: sections(found), "make study-page", __doc__)


if __name__ == "__main__":
    sys.exit(main())
