"""Write docs/models.md, what works for which architecture, from the rows of the zoo.

python -m tests.zoo.page [--check]
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence

from tests.zoo.models import KINDS
from tests.zoo.refusals import RIGHT, refusal
from tests.zoo.rows import RESULTS, ROOT, Row, Run, read

PAGE = ROOT / "docs" / "models.md"
COLUMNS = {
    "`apply_pc`": (
        r"\w+\.(intact|residual)\.(?!stock|merge|unload)\w+|\w+\.serve\.\w+",
        "both forms start as the base, the intact one to the bit; gradients are those that follow from the base's; "
        "frozen tensors stay; a classifier's head trains; gradient checkpointing; generation; bfloat16; a saved "
        "adapter loads to the same bits; the export for servers",
    ),
    "PCConfig": (
        r"\w+\.peft\.(?!stock)\w+",
        "`get_peft_model` with a PCConfig: start, gradients, head, saving, loading by PEFT and by `ipca.load_adapter`, "
        "`merge_and_unload`",
    ),
    "stock PEFT": (
        r"\w+\.(intact|residual|peft)\.stock\w*",
        "in a process without ipca, PEFT loads and merges every folder that was saved, and transformers' "
        "`load_adapter` loads it: outputs within 1e-5",
    ),
    "merge": (
        r"\w+\.(intact|residual)\.(merge|unload)\w*",
        "merging, unmerging and unloading; `save_pretrained` of the plain model",
    ),
    "`ipca`": (
        r"\w+\.cli\.\w+",
        "`ipca inspect`, `init` (the file of `apply_pc`, to the bit), `merge`, `init --form residual`",
    ),
    "Trainer": (
        r"\w+\.trainer\w*\.\w+",
        "transformers' Trainer resumes from a checkpoint, and loads the best model, to the same bits",
    ),
}
"""Columns of the tables: the names of the checks, as a regular expression, and what they are."""
HEAD = """# Models

<!-- Generated from tests/zoo/results by `python -m tests.zoo.page`; do not edit. -->

{architectures} architectures of transformers and diffusers, each a tiny model with random weights, most with two blocks
of width 32, on a CPU in float32: {checks} checks. Quality, speed and memory are not measured here; quantized, sharded
and compiled models are tested elsewhere. Run with {versions}. `make zoo` runs what is missing.

| column | checked |
|---|---|
| layers | how many layers `"all-linear"` adapts; stacks of experts; all layers with embeddings, convolutions and head |
{columns}

**yes**: every check that applies passed. A letter: something is [refused](#refusals) for that reason, the rest passed.
**no**: something is not right yet, see [open faults](#open-faults). A dash: nothing to check, or what comes first
failed.
"""


def page() -> str:
    """The page."""
    found = {name: read(name, RESULTS) for kind in KINDS.values() for name in kind}
    run = {name: pair for name, pair in found.items() if pair is not None}
    letters: dict[str, str] = {}
    tables = [table(kind, {name: run.get(name) for name in models}, letters) for kind, models in KINDS.items()]
    rows = [row for _, some in run.values() for row in some]
    head = HEAD.format(
        architectures=len(run),
        checks=f"{sum(row.outcome not in ('none', 'needs') for row in rows):,}",
        versions=used_versions(run.values()),
        columns="\n".join(f"| {name} | {text} |" for name, (_, text) in COLUMNS.items()),
    )
    bad = [row for _, some in run.values() for row in some if verdict(row, some) == "no"]
    return "\n\n".join([head.strip(), *tables, refusals(run.values(), letters), open_faults(bad)]) + "\n"


def used_versions(run: Iterable[tuple[Run, list[Row]]]) -> str:
    """The versions of the libraries, several where rows are from several."""
    names: dict[str, set[str]] = {}
    for first, _ in run:
        for name, version in first.versions.items():
            names.setdefault(name, set()).add(version)
    return ", ".join(f"{name} {' and '.join(sorted(some))}" for name, some in names.items()) or "nothing yet"


def verdict(row: Row, rows: Sequence[Row]) -> str:
    """``"yes"``, ``"no"``, the reason of a refusal, or nothing where a row says nothing."""
    if row.outcome in RIGHT:
        return "yes" if row.outcome == "ok" else ""
    return refusal(row, rows) or "no"


def table(kind: str, models: Mapping[str, tuple[Run, list[Row]] | None], letters: dict[str, str]) -> str:
    """The architectures of one kind."""
    lines = [f"| architecture | class | layers | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 3) + "|"]
    for name, pair in models.items():
        if pair is None:
            lines.append(f"| {name} | not run |" + " |" * (len(COLUMNS) + 1))
            continue
        cells = [cell(pattern, pair[1], letters) for pattern, _ in COLUMNS.values()]
        lines.append(f"| {name} | {pair[0].class_name} | {layers(pair[1])} | {' | '.join(cells)} |")
    return "\n".join([f"## {kind}", "", *lines])


def layers(rows: Iterable[Row]) -> str:
    """How many layers each selection has."""
    texts = {row.check: row.text.removesuffix(" layers") for row in rows if row.check.endswith(".intact.apply")}
    counts = {check.partition(".")[0]: text for check, text in texts.items() if text.isdigit()}
    words = {"linear": "{}", "experts": "{} stacks", "named": "{} by name"}
    return ", ".join(word.format(counts[key]) for key, word in words.items() if key in counts)


def cell(pattern: str, rows: Sequence[Row], letters: dict[str, str]) -> str:
    """One column of one architecture."""
    own = [row for row in rows if re.fullmatch(pattern, row.check) or "." not in row.check]  # a crash is no one check's
    found = {verdict(row, rows) for row in own} - {""}
    if "no" in found:
        return "no"
    reasons = sorted(found - {"yes"})
    for reason in reasons:
        letters.setdefault(reason, chr(ord("a") + len(letters)))
    return ", ".join(letters[reason] for reason in reasons) or ("yes" if found else "–")


def refusals(run: Iterable[tuple[Run, list[Row]]], letters: Mapping[str, str]) -> str:
    """Each reason with its architectures, and an example of the message."""
    lines = ["## Refusals", ""]
    refused: dict[str, list[Row]] = {reason: [] for reason in letters}
    for _, rows in run:
        for row in rows:
            if ".lora." not in row.check and (reason := verdict(row, rows)) in refused:
                refused[reason].append(row)
    if not refused:
        return "\n".join([*lines, "None."])
    lines += ["| | reason | architectures | for example |", "|---|---|---|---|"]
    for reason, rows in refused.items():
        lines.append(f"| {letters[reason]} | {reason} | {names(rows)} | {shown(rows[0])} |")
    return "\n".join(lines)


def open_faults(rows: Sequence[Row]) -> str:
    """What is not right yet, one line for each kind of message."""
    if not rows:
        return "## Open faults\n\nNone."
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(message_kind(row), []).append(row)
    lines = ["## Open faults", "", "| checks | architectures | for example |", "|---|---|---|"]
    for same in groups.values():
        checks = ", ".join(sorted({f"`{row.check}`" for row in same}))
        lines.append(f"| {checks} | {names(same)} | {shown(same[0])} |")
    return "\n".join(lines)


def message_kind(row: Row) -> str:
    """A row's text without names and numbers; for a difference also the check."""
    text = re.sub(r"RuntimeError: ipca: error: |ValueError: ", "", row.text)
    text = re.sub(r"\w+\.[\w.]+|\d[\w.-]*|'[^']*'", "…", text)
    text = re.sub(r"…(, …)*( and … more)?", "…", text)[:60]
    return f"{row.check.rpartition('.')[2]} {text}" if text.startswith("differs") else text


def names(rows: Iterable[Row]) -> str:
    """The architectures of ``rows``."""
    return ", ".join(dict.fromkeys(row.architecture for row in rows))


def shown(row: Row) -> str:
    """A row's text, short enough for a table."""
    text = row.text.replace("|", "\\|").replace("<", "&lt;")
    return f"{row.architecture}: {text if len(text) <= 200 else text[:200] + ' …'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page; with ``--check`` change nothing, and return 1 if it is out of date."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.page", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the page is out of date")
    args = parser.parse_args(arguments)
    text = page()
    if not args.check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print("docs/models.md is out of date; run: python -m tests.zoo.page", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
