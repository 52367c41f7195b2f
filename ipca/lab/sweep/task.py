"""The task of a sweep: a pretrained model, its training and its evaluation."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ipca._error_note import error_note
from ipca.model.settings import AdapterSettings


@dataclass(frozen=True)
class Task:
    """A pretrained model, how to train it, and how to evaluate it.

    With several workers each process gets its own copy, so the functions must be importable from a module (or a
    ``functools.partial`` of such functions), and a script must start the sweep under ``if __name__ == "__main__":``.

    Attributes:
        build: returns the pretrained model with its new head; the same bits every time. The random generators of torch,
            NumPy and Python are seeded before each call.
        train: ``train(model, groups, seed)`` trains with any torch optimizer over ``groups``, the parameter groups
            with the rates of the sweep: ``torch.optim.AdamW(groups, weight_decay=0)``. With a Hugging Face Trainer:
            ``Trainer(model, …, optimizers=(optimizer, None)).train()``.
        evaluate: ``evaluate(model)`` returns floats by name; called in evaluation mode, without gradients. ``"target"``
            (the new task) and ``"retained"`` (what the model knew) are required, and larger is better for both; other
            metrics are optional.
        settings: layers, rank, ``modules_to_save`` (the head). Its window is the reference of the controls.
        calibration: returns unlabeled batches for the method ``"auto"``, called once for all of its trials, and for
            CorDA and LoRA-Null, called for each of theirs.
        labels: axis labels of metrics, with units: ``{"target": "accuracy on …"}``.
    """

    build: Callable[[], nn.Module]
    train: Callable[[nn.Module, list[dict[str, Any]], int], object]
    evaluate: Callable[[nn.Module], Mapping[str, float]]
    settings: AdapterSettings
    calibration: Callable[[], Iterable[Any]] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("build", "train", "evaluate"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name} must be a function, got {getattr(self, name)!r}.")
        if not isinstance(self.settings, AdapterSettings):
            raise TypeError(f"settings must be an ipca.model.AdapterSettings, got {self.settings!r}.")
        if not isinstance(self.labels, Mapping):
            raise TypeError(f"labels must be a mapping, {{'target': 'accuracy on …'}}; got {self.labels!r}.")
        if self.settings.window_pattern:
            raise ValueError("a sweep moves the window of every layer; leave window_pattern out.")


def load_task(path: Path) -> Task:
    """The result of ``task()`` in the Python file at ``path``, which may import its neighbors.

    The file's folder, or for a file in a package the folder that contains the package, is added to ``sys.path``.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its name does not end in ``.py``.
        TypeError: it defines no ``task``, or that returns something else.
        Exception: any error raised by the file, with a note that names the file.
    """
    path = path.absolute()
    if not path.is_file():
        raise FileNotFoundError(f"no task file at {path}; it must be a Python file with a function task().")
    if path.suffix != ".py":
        raise ValueError(f"{path} is not a Python file; see `ipca sweep --example`.")
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
    with error_note(f"In the task file {path}."):
        spec.loader.exec_module(module)
    make = getattr(module, "task", None)
    if not callable(make):
        raise TypeError(f"{path} defines no function task(); it must return an ipca.lab.sweep.Task.")
    with error_note(f"In task() of {path}."):
        task = make()
    if not isinstance(task, Task):
        raise TypeError(f"task() in {path} returned a {type(task).__name__}; it must return an ipca.lab.sweep.Task.")
    return task
