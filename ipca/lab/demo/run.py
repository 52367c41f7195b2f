"""Run of the demo: ``ipca train`` on real text, then what its adapter is to other programs, and the picture."""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ipca
from ipca._atomic import staged_files
from ipca.io.model_folder import copy_companions, load_model
from ipca.io.output_folder import check_output
from ipca.lab.demo.data import Labeled, Text, load_text
from ipca.lab.demo.encoder import model_path
from ipca.train.report import summary
from ipca.train.run import fine_tune
from ipca.train.settings import TrainSettings

OUTPUTS = {"data", "adapter", "merged"}
"""What the demo writes into its folder."""
_DATA = ("movies.csv", "movies-test.csv", "other.txt")
_STOCK_PEFT = Path(__file__).with_name("stock_peft.py")
_CLASSES = ("negative", "positive")


def run_demo(
    archive: Path, out: Path, *, steps: int = 60, sentences: int = 200, overwrite: bool = False
) -> dict[str, object]:
    """Fine-tune all-MiniLM-L6-v2 on the sentiment of movie reviews, and measure its drift on other sentences.

    ``out`` gets the files in ``data/``, what ``ipca train`` writes in ``adapter/``, and a plain model in ``merged/``.

    Args:
        archive: the text, see ``ipca.lab.demo.data``.
        out: new, empty or of an earlier run; a run that was killed goes on.
        steps: of the training.
        sentences: held-out sentences of the task; three quarters as many of other sources shall keep their embeddings.
        overwrite: replace an ``out`` that holds something else.

    Returns:
        The printed results as a dictionary.

    Raises:
        FileExistsError: ``out`` holds something else.
        FileNotFoundError, ValueError, ImportError: the text, the model or a package is missing.
        RuntimeError: stock PEFT failed to load the adapter.
    """
    began = time.perf_counter()
    check_output(out, whole=True, overwrite=overwrite, resumes=lambda names: _is_demo(out, names))
    text = load_text(archive, test=sentences, probe=sentences)
    model, data = model_path(), out / "data"
    write_data(text, data)
    settings = TrainSettings(
        model,
        str(data / _DATA[0]),
        held_out=str(data / _DATA[1]),
        keep=str(data / _DATA[2]),
        targets=("intermediate.dense",),
        lr=2e-3,
        steps=steps,
        max_length=32,
        evaluations=5,
    )
    print(_command(settings, out / "adapter"), flush=True)
    outcome = fine_tune(settings, out / "adapter", overwrite=overwrite)
    print(f"\n{summary(outcome)}\n")
    checks = _check_adapter(model, text.test.texts[:32], out)
    seconds = time.perf_counter() - began
    print(f"done in {seconds:.0f} s")
    print(f"report: {out / 'adapter' / 'report.html'}   picture: {out / 'adapter' / 'curve.png'}")
    return {**outcome.record(), "checks": checks, "seconds": seconds}


def _is_demo(out: Path, names: set[str]) -> bool:
    """Whether ``out``, which holds ``names``, is the folder of an earlier demo, whose data are written first."""
    return names <= OUTPUTS and (out / "data" / _DATA[0]).is_file()


def write_data(text: Text, folder: Path) -> None:
    """The files of ``ipca train``: movie reviews with their sentiment, and sentences of other sources."""
    with staged_files(folder) as stage:
        for name, part in zip(_DATA, (text.train, text.test), strict=False):
            _write_csv(part, stage / name)
        (stage / _DATA[2]).write_text("\n".join(text.kept()) + "\n", encoding="utf-8")


def _write_csv(part: Labeled, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("text", "label"))
        writer.writerows((text, _CLASSES[label]) for text, label in zip(part.texts, part.labels, strict=True))


def _command(settings: TrainSettings, out: Path) -> str:
    """The command that does the same."""
    words = ["ipca train", settings.model, settings.data, f"--held-out {settings.held_out}", f"--keep {settings.keep}"]
    words += [f"--targets {' '.join(settings.targets or ())}", f"--lr {settings.rate:g}", f"--steps {settings.steps}"]
    words += [f"--max-length {settings.max_length}", f"--evaluations {settings.evaluations}", f"-o {out}"]
    return " \\\n    ".join(words)


@torch.no_grad()
def _check_adapter(model: str, sentences: Sequence[str], out: Path) -> dict[str, float]:
    """Load the adapter with ipca and with stock PEFT, and merge it; the largest difference of the logits of each."""
    from transformers import AutoTokenizer

    adapter = out / "adapter"
    tokens = AutoTokenizer.from_pretrained(adapter)(list(sentences), padding=True, truncation=True, return_tensors="pt")
    inputs = {name: tokens[name].contiguous() for name in ("input_ids", "attention_mask")}
    ours: Any = ipca.load_adapter(load_model(Path(model), adapter=adapter), adapter).eval()
    logits = ours(**inputs).logits
    loaded, merged = _stock_logits(model, inputs, out)
    found = {"stock PEFT": _largest(loaded, logits), "stock PEFT merged": _largest(merged, logits)}
    ipca.unload(ours)
    found["merged"] = _largest(ours(**inputs).logits, logits)
    with staged_files(out / "merged") as stage:
        ours.save_pretrained(stage)
        copy_companions(Path(model), stage)
    print(f"stock PEFT:         max |Δlogit| {found['stock PEFT']:.1e}   (a process without ipca)")
    print(f"stock PEFT, merged: max |Δlogit| {found['stock PEFT merged']:.1e}")
    print(f"merged by ipca:     max |Δlogit| {found['merged']:.1e}   saved to {out / 'merged'}")
    print(f"largest |logit| {logits.abs().max().item():.2f}")
    return found


def _stock_logits(model: str, inputs: Mapping[str, Tensor], out: Path) -> tuple[Tensor, Tensor]:
    """Logits of the saved adapter, loaded and merged, from a process that cannot import ipca."""
    with tempfile.TemporaryDirectory() as folder:
        tokens, result = Path(folder, "inputs.safetensors"), Path(folder, "logits.safetensors")
        save_file(dict(inputs), tokens)
        arguments = [model, out / "adapter", len(_CLASSES), tokens, result]
        command = [sys.executable, str(_STOCK_PEFT), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"stock PEFT could not load {out / 'adapter'}: {done.stderr.strip().splitlines()[-1]}")
        logits = load_file(result)
    return logits["loaded"], logits["merged"]


def _largest(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()
