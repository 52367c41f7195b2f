"""Experiment V2: the digits ViT learns five tasks of two digits each, with every method of ``ipca.lab.continual``.

Each task is to distinguish its two digits, rotated and inverted, by the new head's logits of these two. ``V2.csv`` has
one row per stream, ``V2-scores.csv`` the scores after each task.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from ipca._atomic import staged_files
from ipca.lab.continual import METHODS, ContinualLearner, StreamTask, run_stream
from ipca.lab.demo.encoder import accuracy
from studies.window_position import digits
from studies.window_position.pretraining import Pretraining
from studies.window_position.train_loop import fit, shuffled_batches
from studies.window_position.vit import ViT

PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
RATE, STEPS, SEEDS = 1e-3, 80, 10


def run_streams(folder: Path, results: Path, workers: int) -> None:
    """Run every method with every seed that is not in ``folder`` yet, and write the two tables to ``results``."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = [(method, seed) for method in METHODS for seed in range(SEEDS)]
    todo = [(method, seed) for method, seed in runs if not _file(folder, method, seed).exists()]
    digits.build(Pretraining())  # once, before the processes read it
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        done = pool.map(partial(_save_stream, folder), *zip(*todo, strict=True))
        for _ in tqdm(done, total=len(todo), desc="Streams"):
            pass
    found = [json.loads(_file(folder, method, seed).read_text()) for method, seed in runs]
    with staged_files(results) as stage:
        _write(stage / "V2.csv", (each["summary"] for each in found))
        _write(stage / "V2-scores.csv", (row for each in found for row in each["scores"]))


def one_stream(method: str, seed: int) -> dict[str, Any]:
    """One stream: its row of ``V2.csv`` and its rows of ``V2-scores.csv``."""
    learner = ContinualLearner(digits.build(Pretraining()), method, digits.SETTINGS, tasks=len(PAIRS), seed=seed)
    found = run_stream(learner, [_task(pair) for pair in PAIRS], retained=digits_accuracy)
    last = found.records[-1]
    summary = {
        "method": method,
        "seed": seed,
        "acc": found.matrix.acc,
        "bwt": found.matrix.bwt,
        "fm": found.matrix.forgetting,
        "retained_before": found.retained[0],
        "retained_after": found.retained[-1],
        "trained": last.trained,
        "parameters": last.kept_parameters,
        "bytes": last.kept_bytes,
    }
    return {"summary": summary, "scores": found.rows()}


def _task(pair: tuple[int, int]) -> StreamTask:
    return StreamTask(f"{pair[0]} or {pair[1]}", partial(_train, pair), partial(_evaluate, pair))


def _train(pair: tuple[int, int], learner: ContinualLearner, seed: int) -> None:
    model, data = learner.model, digits.images()
    mine = torch.isin(data.train_digits, torch.tensor(pair))
    shown, second = digits.turned(data.train[mine]), (data.train_digits[mine] == pair[1]).long()

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(shown[batch])[:, pair], second[batch]) + learner.penalty()

    trained = [p for p in model.parameters() if p.requires_grad]
    batches = shuffled_batches(len(shown), digits.BATCH, STEPS)
    fit(model, cast(nn.Linear, model.head), [{"params": trained, "lr": RATE}], batches, loss)


def _evaluate(pair: tuple[int, int], model: ViT) -> float:
    data = digits.images()
    mine = torch.isin(data.test_digits, torch.tensor(pair))
    logits = model.head(digits.features_of(model, digits.turned(data.test[mine])))
    return accuracy(logits[:, pair], (data.test_digits[mine] == pair[1]).tolist())


def digits_accuracy(model: nn.Module) -> float:
    """The accuracy of the frozen classifier on the upright test images."""
    assert isinstance(model, ViT)
    data = digits.images()
    return accuracy(model.classifier(digits.features_of(model, data.test)), data.test_digits.tolist())


def _save_stream(folder: Path, method: str, seed: int) -> None:
    with staged_files(folder) as stage:
        (stage / _file(folder, method, seed).name).write_text(json.dumps(one_stream(method, seed)))


def _file(folder: Path, method: str, seed: int) -> Path:
    return folder / f"{method}-{seed}.json"


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    rows = list(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
