"""The report of a run: one HTML page without scripts or links to other files."""

from __future__ import annotations

import html
import tempfile
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from ipca._atomic import write_atomic
from ipca.train.figures import draw_run

if TYPE_CHECKING:
    from ipca.train.outcome import Outcome
    from ipca.train.settings import TrainSettings

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
figure { margin: 1.5rem 0; background: white; border-radius: 6px; }
figure svg { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.kept { font-weight: 600; }
pre { overflow-x: auto; padding: .75rem; border: 1px solid #8884; border-radius: 6px; }
</style>
</head>
<body>
<h1>$title</h1>
<p>$summary</p>
<figure>$figure</figure>
<h2>Measurements</h2>
<div class="wide">$curve</div>
<h2>Load it</h2>
<pre>from peft import PeftModel

model = PeftModel.from_pretrained(base, "$folder")</pre>
<h2>Settings</h2>
<div class="wide">$settings</div>
<p>ipca train --config run.yaml -o NEW_FOLDER makes it again.</p>
</body>
</html>
""")


def write_report(outcome: Outcome, path: Path, task: str) -> None:
    """Write the page to ``path``.

    Raises:
        ImportError: matplotlib is missing.
        OSError: ``path`` cannot be written.
    """
    settings = outcome.settings
    fields = {
        "title": html.escape(f"{Path(settings.model).name}, {task}, on {Path(settings.data).name}"),
        "summary": html.escape(summary(outcome)),
        "figure": _figure(outcome),
        "curve": _curve(outcome),
        "folder": html.escape(str(outcome.out)),
        "settings": _table(["setting", "value"], _settings(settings)),
    }
    write_atomic(path, _PAGE.substitute(fields).encode())


def summary(outcome: Outcome) -> str:
    """One or two sentences on what was learned and what was forgotten."""
    base, best = outcome.rows[0], outcome.best
    went = "rose" if best["eval_loss"] > base["eval_loss"] else "fell"
    text = f"Kept: {outcome.kept_step_text}. The held-out loss {went} from "
    text += f"{base['eval_loss']:.4g} to {best['eval_loss']:.4g}"
    if "eval_accuracy" in best:
        text += f", the accuracy went from {base['eval_accuracy']:.3f} to {best['eval_accuracy']:.3f}"
    if outcome.metric:
        text += f"; {outcome.description}: {best[f'eval_{outcome.metric}']:.4g}"
        if outcome.settings.budget is not None:
            text += f", within the budget of {outcome.settings.budget:g}"
    return f"{text}."


def _settings(settings: TrainSettings) -> list[list[Any]]:
    """Names and values; of ``epochs`` and ``steps`` that which counted."""
    unused = "epochs" if settings.steps else "steps"
    return [[name, value] for name, value in settings.to_dict().items() if name != unused]


def _figure(outcome: Outcome) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "curve.svg")
        budget = outcome.settings.budget
        draw_run(outcome.rows, path, outcome.best, outcome.metric, outcome.description, budget)
        text = path.read_text(encoding="utf-8")
    return text[text.index("<svg") :]


def _curve(outcome: Outcome) -> str:
    names = list(dict.fromkeys(name for row in outcome.rows for name in row))
    rows = [[row.get(name, "") for name in names] for row in outcome.rows]
    kept = next((k for k, row in enumerate(outcome.rows) if row == outcome.best), None)
    return _table(
        [name.removeprefix("eval_") if name != "eval_loss" else "held-out loss" for name in names], rows, kept
    )


def _table(head: list[str], rows: list[list[Any]], marked: int | None = None) -> str:
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in head) + "</tr>"]
    for k, row in enumerate(rows):
        cells = "".join(f"<td>{html.escape(_text(value))}</td>" for value in row)
        lines.append(f'<tr class="kept">{cells}</tr>' if k == marked else f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</table>"])


def _text(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else str(value)
