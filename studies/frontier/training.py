"""One run: fine-tune, measure at checkpoints and along the scale of the final change, resume where it was killed."""

from __future__ import annotations

import copy
import importlib.metadata
import io
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ipca._atomic import write_atomic
from ipca._version import __version__
from ipca.lab.sweep.device import deterministic, device_name
from ipca.svd import SpectralCache
from studies.frontier.arms import Tuned
from studies.frontier.design import Design, Run
from studies.frontier.material import Measured, Reference, Task
from studies.frontier.rows import Line, Rows


@dataclass
class Study:
    """A model and its tasks, with what all runs on them share.

    Attributes:
        design: the protocol's numbers.
        base: the pretrained model.
        tasks: their material, by name.
        work: folder of what is not kept: decompositions and states of unfinished runs.
        hashes: of protocol and model, part of every line.
        added: by arm of an addition to the protocol, the hash that takes the protocol's place.
        progress: show a bar for each run.
    """

    design: Design
    base: nn.Module
    tasks: Mapping[str, Task]
    work: Path
    hashes: Mapping[str, str]
    progress: bool = True
    added: Mapping[str, str] = field(default_factory=dict)
    _references: dict[str, tuple[Reference, Measured]] = field(default_factory=dict)
    _inputs: dict[tuple[str, str], Sequence[Any]] = field(default_factory=dict)

    def reference(self, task: str) -> tuple[Reference, Measured]:
        """What measures against the base on ``task``, and the base's own measurement."""
        if task not in self._references:
            reference = self.tasks[task].reference(self.base)
            self._references[task] = reference, reference.measure(self.base)
        return self._references[task]

    def inputs(self, task: str, of: str) -> Sequence[Any]:
        """What an arm that looks at inputs is shown, made once."""
        if (task, of) not in self._inputs:
            self._inputs[task, of] = self.tasks[task].inputs(of, self.base)
        return self._inputs[task, of]

    def hashes_of(self, run: Run) -> dict[str, str]:
        """The hashes in the lines of ``run``: of protocol, model and task."""
        protocol = {"protocol": self.added[run.arm]} if run.arm in self.added else {}
        task = self.tasks[run.task]
        return {**self.hashes, **protocol, task.kind: task.sha256()[:12]}

    @property
    def spectra(self) -> SpectralCache:
        return SpectralCache(self.work / "spectra")


def train_run(study: Study, run: Run, rows: Rows, wait: Callable[[], None] = lambda: None) -> None:
    """Make ``run`` and store its lines; its state is kept at every checkpoint until then.

    The same run gives the same bits on the same machine with the same versions and threads, whether it was killed and
    resumed or not. A run whose loss is not finite ends there; its remaining lines have no values.

    Args:
        wait: called before every step, returns when the run shall go on.
    """
    design, arm = study.design, study.design.arms[run.arm]
    reference, base = study.reference(run.task)
    inputs = study.inputs(run.task, arm.inputs) if arm.inputs else None
    tuned = Tuned(copy.deepcopy(study.base), arm, design.rank, run.seed, study.spectra, inputs)
    optimizer = torch.optim.AdamW(list(tuned.trained.values()), lr=run.rate, weight_decay=0.0)
    state = _State(study.work / "states" / f"{run.key}.pt", tuned, optimizer)
    known = {**asdict(run), **study.hashes_of(run)}
    start = {**known, **_line(0, 0.0, 0.0, base), "environment": environment(study.base)}
    lines = state.load(start)
    task = study.tasks[run.task]
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(run.seed))
    done = int(lines[-1]["step"])
    steps = tqdm(range(done + 1, run.steps + 1), desc=run.key, unit="step", disable=not study.progress)
    device = next(tuned.model.parameters()).device
    diverged = lines[-1]["status"] != "ok"
    with deterministic(device):
        for step in steps:
            if not diverged:
                wait()
                rate = run.rate * design.rate_factor(step, run.steps)
                chosen = order[torch.arange((step - 1) * design.batch, step * design.batch) % len(order)]
                diverged = not _train_step(tuned, optimizer, rate, task, chosen, autocast=design.autocast)
            if step in design.steps_measured(run.steps)[:-1]:
                found = None if diverged else reference.measure(tuned.model)
                lines.append({**known, **_line(step, 1.0, tuned.update(), found)})
                state.save(lines)
        update, items = tuned.update(), {}
        scales = sorted({*design.scales, *(design.finer if design.is_checked(run) else ())})
        for scale in tqdm(scales, desc=f"{run.key}, scales", disable=not study.progress):
            wait()
            with tuned.scaled(scale) as model:
                found = None if diverged else reference.measure(model)
            lines.append({**known, **_line(run.steps, scale, scale * update, found)})
            if scale == 1.0 and found is not None and (design.itemized is None or run.seed in design.itemized):
                items = found.items()
    rows.put(run, lines, items)
    state.delete()


def environment(model: nn.Module) -> dict[str, Any]:
    """What the bits of a run depend on besides its settings."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "ipca": __version__}
    versions["transformers"] = importlib.metadata.version("transformers")
    device = next(model.parameters()).device
    return {**versions, "device": device_name(device), "threads": torch.get_num_threads(), "cores": os.cpu_count()}


def _train_step(
    tuned: Tuned, optimizer: torch.optim.Optimizer, rate: float, task: Task, chosen: Tensor, *, autocast: bool
) -> bool:
    """One step at ``rate``; False, and no step, if the loss is not finite."""
    tuned.model.train()
    for group in optimizer.param_groups:
        group["lr"] = rate
    device = next(tuned.model.parameters()).device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        loss = task.loss(tuned.model, chosen)
    if not math.isfinite(loss.item()):
        return False
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    tuned.pull(rate)
    return True


def _line(step: int, scale: float, update: float, found: Measured | None) -> Line:
    means: dict[str, float | None] = {} if found is None else found.means()
    ok = bool(means) and None not in means.values()
    status = "ok" if ok else "diverged"
    return {
        "step": step,
        "scale": scale,
        "status": status,
        "update": update if math.isfinite(update) else None,
        **means,
    }


class _State:
    """The state of an unfinished run in a file."""

    def __init__(self, path: Path, tuned: Tuned, optimizer: torch.optim.Optimizer) -> None:
        self._path, self._tuned, self._optimizer = path, tuned, optimizer

    def load(self, start: Line) -> list[Line]:
        """Set parameters and optimizer to the file's and return its lines; ``start`` if there is none.

        A state that began otherwise, such as with another protocol, version or number of threads, is left aside.
        """
        found = torch.load(self._path, weights_only=True) if self._path.exists() else None
        if found is None or found["lines"][0] != start:
            return [start]
        with torch.no_grad():
            for name, parameter in self._tuned.trained.items():
                parameter.copy_(found["trained"][name])
        self._optimizer.load_state_dict(found["optimizer"])
        lines: list[Line] = found["lines"]
        return lines

    def save(self, lines: list[Line]) -> None:
        """Write the state as it is after the last of ``lines``."""
        trained = {name: parameter.detach() for name, parameter in self._tuned.trained.items()}
        buffer = io.BytesIO()
        torch.save({"trained": trained, "optimizer": self._optimizer.state_dict(), "lines": lines}, buffer)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path, buffer.getvalue())

    def delete(self) -> None:
        self._path.unlink(missing_ok=True)
