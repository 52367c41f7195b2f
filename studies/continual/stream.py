"""One stream: the digits ViT learns to tell five pairs of silhouettes apart, one after the other."""

from __future__ import annotations

import math
import platform
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipca._version import __version__
from ipca.lab.continual import ContinualLearner, StreamTask, run_stream
from ipca.lab.demo.encoder import accuracy
from studies.continual.design import BATCH, PAIRS, STEPS, Run, protocol_sha256
from studies.continual.silhouettes import NAMES, pair
from studies.frontier.run import weights_sha256
from studies.window_position import digits
from studies.window_position.pretraining import Pretraining
from studies.window_position.stream import digits_accuracy
from studies.window_position.train_loop import fit, shuffled_batches
from studies.window_position.vit import ViT


def one_stream(run: Run) -> dict[str, Any]:
    """The row of a run: ``acc``, ``bwt``, ``fm``, the accuracy on upright digits before and after, and what it kept;
    with a hash of the base model's weights.

    A run whose parameters are not finite has no values.
    """
    known = {"method": run.method, "rate": run.rate, "seed": run.seed, "protocol": protocol_sha256()}
    known |= {"torch": str(torch.__version__), "ipca": __version__, "device": platform.machine()}
    model = base()
    known["model"] = weights_sha256(model)[:12]
    learner = ContinualLearner(model, run.method, digits.SETTINGS, tasks=len(PAIRS), seed=run.seed)
    try:
        found = run_stream(learner, [_task(first, run.rate) for first in PAIRS], retained=digits_accuracy)
    except ValueError as error:
        if not any(word in str(error) for word in ("NaN", "finite")):
            raise
        return known | {"status": f"diverged: {error}"}
    last = found.records[-1]
    scores = {"acc": found.matrix.acc, "bwt": found.matrix.bwt, "fm": found.matrix.forgetting}
    scores |= {"retained_before": found.retained[0], "retained_after": found.retained[-1]}
    costs = {"trained": last.trained, "parameters": last.kept_parameters, "bytes": last.kept_bytes}
    return known | {"status": "ok", **scores, **costs, "scores": found.matrix.R.tolist()}


def base() -> ViT:
    """The model that every stream starts from."""
    return digits.build(Pretraining())


def _task(first: int, rate: float) -> StreamTask:
    return StreamTask(f"{NAMES[first]} or {NAMES[first + 1]}", partial(_train, first, rate), partial(_evaluate, first))


def _train(first: int, rate: float, learner: ContinualLearner, seed: int) -> None:
    model, data, outputs = learner.model, pair(first), [first, first + 1]

    def loss(batch: Tensor) -> Tensor:
        return F.cross_entropy(model(data.train[batch])[:, outputs], data.train_second[batch]) + learner.penalty()

    trained = [p for p in model.parameters() if p.requires_grad]
    batches = shuffled_batches(len(data.train), BATCH, STEPS)
    assert isinstance(model, ViT)
    fit(model, model.head, [{"params": trained, "lr": rate}], batches, loss)


def _evaluate(first: int, model: nn.Module) -> float:
    assert isinstance(model, ViT)
    logits = model.head(digits.features_of(model, pair(first).test))[:, [first, first + 1]]
    return accuracy(logits, pair(first).test_second.tolist()) if bool(logits.isfinite().all()) else math.nan
