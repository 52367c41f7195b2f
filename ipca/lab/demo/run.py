"""``ipca demo``: four ways to fine-tune one model on one task, then one adapter through its whole life."""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

import ipca
from ipca._atomic import check_writable, staged_files
from ipca.lab.demo import report
from ipca.lab.demo.data import Text, load_text
from ipca.lab.demo.task import METHODS, Encoder, Outcome, Probe, Settings, load_encoder, run

_STOCK_PEFT = Path(__file__).with_name("stock_peft.py")
KEPT = "middle"  # the adapter that is saved, loaded elsewhere and merged


def demo(archive: Path, out: Path, *, seeds: int = 1, steps: int = 60, sentences: int = 400) -> dict[str, object]:
    """Run the demo and write ``demo.csv``, ``demo.png``, ``adapter/`` and ``merged/`` below ``out``.

    Args:
        archive: the text, see :mod:`ipca.lab.demo.data`.
        out: made if missing; files of an earlier run are replaced, each only when the new one is complete.
        seeds: runs of each method.
        steps: training steps of each run.
        sentences: held-out sentences of the task's test and of the probe's.

    Returns:
        What was printed, as a dictionary.

    Raises:
        FileNotFoundError, ValueError, ImportError: the text, the model or a package is missing.
        RuntimeError: stock PEFT failed to load the adapter.
    """
    began = time.perf_counter()
    check_writable(out)
    settings = Settings(steps=steps)
    text = load_text(archive, test=sentences, probe=sentences)
    _quiet()
    base = load_encoder(settings)
    probe = Probe(base, text)
    print(_introduction(text, settings, probe, seeds))
    rows, encoder, head = _rows(base, probe, text, settings, seeds)
    with staged_files(out) as stage:
        report.write_rows(rows, stage / "demo.csv")
        report.draw(rows, stage / "demo.png")
    print(f"\n{report.table(rows)}\n")
    print(f"mean over {seeds} seeds (smallest … largest)" if seeds > 1 else "one seed; --seeds 3 shows the spread")
    print(f"table: {out / 'demo.csv'}   picture: {out / 'demo.png'}\n")
    life = _life_of_an_adapter(base, encoder, head, text.test.texts[:32], out)
    seconds = time.perf_counter() - began
    print(f"done in {seconds:.0f} s")
    return {"table": rows, **life, "seconds": seconds}


def _rows(
    base: Encoder, probe: Probe, text: Text, settings: Settings, seeds: int
) -> tuple[list[report.Row], Encoder, nn.Linear]:
    """All rows of the table, and the encoder and head of the method that is kept, seed 0."""
    rows, kept = [], None
    runs = [(method, seed) for method in METHODS for seed in range(seeds)]
    for method, seed in tqdm(runs, desc="Runs", unit="run"):
        began = time.perf_counter()
        outcome, encoder, head = run(base, probe, text, method, settings, seed)
        rows.append(_row(method, seed, outcome, probe, settings, time.perf_counter() - began))
        if (method, seed) == (KEPT, 0):
            kept = encoder, head
    assert kept is not None
    return rows, *kept


def _row(method: str, seed: int, outcome: Outcome, probe: Probe, settings: Settings, seconds: float) -> report.Row:
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
def _life_of_an_adapter(
    base: Encoder, encoder: Encoder, head: nn.Linear, sentences: list[str], out: Path
) -> dict[str, float]:
    """Save, load in stock PEFT in another process, load with ipca, merge; compare logits at every stage."""
    encoder.model.eval()
    logits = head(encoder.states(sentences))
    ipca.save_adapter(encoder.model, out / "adapter")
    head_state = {key: value.contiguous() for key, value in head.state_dict().items()}
    with staged_files(out / "adapter") as stage:
        save_file(head_state, stage / "head.safetensors")
    size = (out / "adapter" / "adapter_model.safetensors").stat().st_size
    print(f"saved the {KEPT} adapter to {out / 'adapter'} ({size / 2**20:.1f} MiB)")

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
    """The logits of the saved adapter in a process that cannot import ipca: loaded, and merged."""
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
    """transformers' own bars and notes would hide ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
