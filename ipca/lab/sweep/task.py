"""What a sweep is about: a model, how it trains, how it is judged."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ipca.lab.sweep.notes import noted
from ipca.model.settings import AdapterSettings


@dataclass(frozen=True)
class Task:
    """A pretrained model, a way to train it and a way to judge it.

    With several workers each process gets its own copy, so that the functions must be importable from a module
    (or ``functools.partial`` of such), and a script must start the sweep under ``if __name__ == "__main__":``.

    Attributes:
        build: makes the pretrained model with its new head; the same bits every time. The random generators of torch,
            NumPy and Python are seeded before each of these calls.
        train: ``train(model, groups, seed)`` trains with any torch optimizer over ``groups``, the parameter groups
            with the rates that the sweep tries: ``torch.optim.AdamW(groups, weight_decay=0)``. A Hugging Face Trainer
            takes it as ``Trainer(model, …, optimizers=(optimizer, None)).train()``.
        evaluate: ``evaluate(model)`` gives floats by name; it is called in evaluation mode, without gradients.
            ``"target"`` (the new task) and ``"retained"`` (what the model knew) are required and larger is better for
            both; any others may join them.
        config: layers, rank, ``modules_to_save`` (the head). Its window is the controls' reference.
        calibration: makes unlabeled batches for the method ``"auto"``, once for all of its trials.
        labels: what a metric is, with its unit: ``{"target": "accuracy on …"}``; for the report's axes.
    """

    build: Callable[[], nn.Module]
    train: Callable[[nn.Module, list[dict[str, Any]], int], object]
    evaluate: Callable[[nn.Module], Mapping[str, float]]
    config: AdapterSettings
    calibration: Callable[[], Iterable[Any]] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("build", "train", "evaluate"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name} must be a function, got {getattr(self, name)!r}.")
        if not isinstance(self.config, AdapterSettings):
            raise TypeError(f"config must be an ipca.PCConfig, got {self.config!r}.")
        if not isinstance(self.labels, Mapping):
            raise TypeError(f"labels must be a mapping, {{'target': 'accuracy on …'}}; got {self.labels!r}.")
        if self.config.window_pattern:
            raise ValueError("a sweep moves the window of every layer; leave window_pattern out.")


def load_task(path: Path) -> Task:
    """What ``task()`` in the Python file at ``path`` returns; what lies beside it is importable then.

    That is the file's folder, or of a file in a package the folder that holds the package.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: it defines no ``task``, or that returns something else.
        Exception: whatever the file raises, with a note that names it.
    """
    path = path.absolute()
    if not path.is_file():
        raise FileNotFoundError(f"no task file at {path}; it is a Python file with a function task().")
    name = f"_ipca_task_{path.stem}"
    root = path.parent
    while (root / "__init__.py").is_file():
        root = root.parent
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with noted(f"In the task file {path}."):
        spec.loader.exec_module(module)
    make = getattr(module, "task", None)
    if not callable(make):
        raise TypeError(f"{path} defines no function task(); it must return an ipca.lab.sweep.Task.")
    task = make()
    if not isinstance(task, Task):
        raise TypeError(f"task() in {path} returned a {type(task).__name__}; it must return an ipca.lab.sweep.Task.")
    return task
