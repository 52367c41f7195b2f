"""Run of the demo: a table and a figure of four methods, then saving, loading and merging of one adapter."""

from __future__ import annotations

import csv
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

import ipca
from ipca._atomic import staged_files
from ipca.analysis.figures import picture
from ipca.io.output_folder import check_output
from ipca.lab.demo.data import Text, load_text
from ipca.lab.demo.task import METHODS, Encoder, Outcome, Probe, Settings, load_encoder, train_and_measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, str]
MEASURES = {
    "accuracy": "movie sentiment,\naccuracy (higher is better)",
    "probe_drop": "source probe,\naccuracy lost (lower is better)",
    "drift": "embedding drift,\nmean 1 − cos (lower is better)",
}
_STOCK_PEFT = Path(__file__).with_name("stock_peft.py")
OUTPUTS = {"demo.csv", "demo.png", "adapter", "merged"}
"""What the demo writes into its folder."""
_SAVED = "middle"
"""The method whose adapter is saved, loaded and merged."""


def run_demo(
    archive: Path, out: Path, *, seeds: int = 1, steps: int = 60, sentences: int = 400, overwrite: bool = False
) -> dict[str, object]:
    """Run the demo and write ``demo.csv``, ``demo.png``, ``adapter/`` and ``merged/`` to ``out``.

    Args:
        archive: the text, see ``ipca.lab.demo.data``.
        out: new, empty or of an earlier run, whose files are replaced atomically.
        seeds: number of runs of each method.
        steps: training steps of each run.
        sentences: size of the test sets of the task and of the probe.
        overwrite: write into an ``out`` that holds something else.

    Returns:
        The printed results as a dictionary.

    Raises:
        FileExistsError: ``out`` holds something else.
        FileNotFoundError, ValueError, ImportError: the text, the model or a package is missing.
        RuntimeError: stock PEFT failed to load the adapter.
    """
    began = time.perf_counter()
    check_output(out, whole=True, overwrite=overwrite, resumes=OUTPUTS.issuperset)
    settings = Settings(steps=steps)
    text = load_text(archive, test=sentences, probe=sentences)
    _quiet()
    base = load_encoder(settings)
    probe = Probe(base, text)
    print(_introduction(text, settings, probe, seeds))
    rows, encoder, head = _measure_all(base, probe, text, settings, seeds)
    with staged_files(out) as stage:
        write_rows(rows, stage / "demo.csv")
        draw_rows(rows, stage / "demo.png")
    print(f"\n{markdown_table(rows)}\n")
    print(f"mean over {seeds} seeds (smallest … largest)" if seeds > 1 else "one seed; --seeds 3 shows the spread")
    print(f"table: {out / 'demo.csv'}   picture: {out / 'demo.png'}\n")
    checks = _check_adapter(base, encoder, head, text.test.texts[:32], out)
    seconds = time.perf_counter() - began
    print(f"done in {seconds:.0f} s")
    return {"table": rows, **checks, "seconds": seconds}


def _measure_all(
    base: Encoder, probe: Probe, text: Text, settings: Settings, seeds: int
) -> tuple[list[Row], Encoder, nn.Linear]:
    """All rows of the table, and the encoder and head of seed 0 of the method whose adapter is saved."""
    rows, saved = [], None
    runs = [(method, seed) for method in METHODS for seed in range(seeds)]
    for method, seed in tqdm(runs, desc="Runs", unit="run"):
        began = time.perf_counter()
        outcome, encoder, head = train_and_measure(base, probe, text, method, settings, seed)
        rows.append(_row(method, seed, outcome, probe, settings, time.perf_counter() - began))
        if (method, seed) == (_SAVED, 0):
            saved = encoder, head
    assert saved is not None
    return rows, *saved


def _row(method: str, seed: int, outcome: Outcome, probe: Probe, settings: Settings, seconds: float) -> Row:
    return {
        "method": method,
        "seed": str(seed),
        "accuracy": f"{outcome.accuracy:.4f}",
        "probe_before": f"{probe.accuracy_before:.4f}",
        "probe_drop": f"{outcome.probe_drop:.4f}",
        "drift": f"{outcome.drift:.4f}",
        "trainable": str(outcome.trainable),
        "rank": str(settings.rank),
        "steps": str(settings.steps),
        "batch": str(settings.batch),
        "lr": str(settings.lr),
        "seconds": f"{seconds:.1f}",
        "device": f"cpu {platform.machine()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ipca": ipca.__version__,
    }


@torch.no_grad()
def _check_adapter(
    base: Encoder, encoder: Encoder, head: nn.Linear, sentences: list[str], out: Path
) -> dict[str, float]:
    """Save the adapter, load it with stock PEFT and with ipca, merge it; compare logits at every stage."""
    encoder.model.eval()
    logits = head(encoder.states(sentences))
    ipca.save_adapter(encoder.model, out / "adapter", overwrite=True)
    head_state = {key: value.contiguous() for key, value in head.state_dict().items()}
    with staged_files(out / "adapter") as stage:
        save_file(head_state, stage / "head.safetensors")
    size = (out / "adapter" / "adapter_model.safetensors").stat().st_size
    print(f"saved the {_SAVED} adapter to {out / 'adapter'} ({size / 2**20:.1f} MiB)")

    reloaded = base.copy()
    ipca.load_adapter(reloaded.model, out / "adapter")
    reloaded.model.eval()
    found = {"ipca": _largest(head(reloaded.states(sentences)), logits)}
    loaded, merged = _stock_logits(encoder, sentences, out)
    found |= {"stock PEFT": _largest(loaded, logits), "stock PEFT merged": _largest(merged, logits)}
    ipca.unload(encoder.model)
    found["merged"] = _largest(head(encoder.states(sentences)), logits)
    with staged_files(out / "merged") as stage:
        encoder.model.save_pretrained(stage)  # type: ignore[operator]
    print(f"loaded by ipca:     max |Δlogit| {found['ipca']:.1e}")
    print(f"stock PEFT:         max |Δlogit| {found['stock PEFT']:.1e}   (a process without ipca)")
    print(f"stock PEFT, merged: max |Δlogit| {found['stock PEFT merged']:.1e}")
    print(f"merged by ipca:     max |Δlogit| {found['merged']:.1e}   saved to {out / 'merged'}")
    print(f"largest |logit| {logits.abs().max().item():.2f}")
    return found


def _stock_logits(encoder: Encoder, sentences: list[str], out: Path) -> tuple[Tensor, Tensor]:
    """Logits of the saved adapter, loaded and merged, from a process that cannot import ipca."""
    tokens = encoder.tokenize(sentences)
    inputs = {key: tokens[key].contiguous() for key in ("input_ids", "attention_mask")}
    adapter = out / "adapter"
    with tempfile.TemporaryDirectory() as folder:
        save_file(inputs, Path(folder) / "inputs.safetensors")
        arguments = [encoder.path, adapter, adapter / "head.safetensors", Path(folder) / "inputs.safetensors"]
        result = Path(folder) / "logits.safetensors"
        command = [sys.executable, str(_STOCK_PEFT), *map(str, arguments), str(result)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"stock PEFT could not load {adapter}: {done.stderr.strip().splitlines()[-1]}")
        logits = load_file(result)
    return logits["loaded"], logits["merged"]


def _largest(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def _introduction(text: Text, settings: Settings, probe: Probe, seeds: int) -> str:
    return (
        f"Learn movie sentiment ({len(text.train.texts)} sentences, {settings.steps} steps of {settings.batch}, "
        f"rank {settings.rank}, AdamW {settings.lr:g}) with all-MiniLM-L6-v2;\n"
        f"measure what is lost: a frozen probe of the sentence's source (accuracy {probe.accuracy_before:.2f} before), "
        f"and embedding drift. {len(METHODS)} methods × {seeds} seeds."
    )


def _quiet() -> None:
    """Disable transformers' progress bars and messages, which would hide ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def read_rows(path: Path) -> list[Row]:
    """The rows of a demo CSV: one per method and seed."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Write ``rows`` as CSV."""
    rows = list(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def markdown_table(rows: list[Row]) -> str:
    """A Markdown table: the mean over seeds of each method, with minimum and maximum in brackets."""
    lines = ["| trained | accuracy | probe drop | drift |", "|---|---|---|---|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [_cell(values(rows, method, measure)) for measure in MEASURES]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def values(rows: list[Row], method: str, measure: str) -> list[float]:
    """One measure of one method, by seed."""
    return [float(row[measure]) for row in rows if row["method"] == method]


def draw_rows(rows: list[Row], path: Path) -> None:
    """Draw one panel per measure: a dot for each seed, a line at their mean."""
    first = rows[0]
    seeds = len({row["seed"] for row in rows})
    with picture(path, (10, 3.4)) as figure:
        for axis, (measure, title) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
            _panel(axis, rows, measure, title)
        figure.suptitle(
            f"all-MiniLM-L6-v2, feed-forward input layers, rank {first['rank']}, {first['steps']} steps, "
            f"AdamW {float(first['lr']):g}; a dot is a seed ({seeds})",
            fontsize=10,
        )


def _panel(axis: Axes, rows: list[Row], measure: str, title: str) -> None:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for k, method in enumerate(methods):
        points = values(rows, method, measure)
        color = "tab:gray" if method == "LoRA" else "tab:blue"
        axis.hlines(mean(points), k - 0.3, k + 0.3, color=color, linewidth=3)
        axis.plot([k] * len(points), points, "o", color="black", markersize=4)
    axis.set_xticks(range(len(methods)), methods)
    axis.set_xlim(-0.5, len(methods) - 0.5)
    axis.set_title(title, fontsize=10)
    axis.grid(axis="y", alpha=0.3)
    axis.axhline(0.5 if measure == "accuracy" else 0, color="black", linewidth=0.8, linestyle=":")


def _cell(points: list[float]) -> str:
    spread = f" ({min(points):.2f} … {max(points):.2f})" if len(points) > 1 else ""
    return f"{mean(points):.2f}{spread}"
