"""The settings of a run: a frozen dataclass that ``run.yaml`` holds."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ipca.window import Window, check_factors

RUN = "run.yaml"
"""The file of a run's settings, in its folder."""
TASKS = ("causal-lm", "sequence-classification", "token-classification", "image-classification")
SCHEDULES = ("linear", "cosine", "constant")
LOSS_ON = ("answers", "all")
DTYPES = ("float32", "bfloat16", "float16")
_RATE, _RATE_PRINCIPAL = 1e-3, 3e-4
_MINIMUM = {
    **dict.fromkeys(("batch", "evaluations", "micro_batch", "patience", "rank", "steps"), 1),
    "keep_tokens": 2,
    "max_length": 2,
    "seed": 0,
    "weight_decay": 0.0,
}
"""The least value of each number that may be it, whole numbers but for the last; those of ``_POSITIVE`` must be larger
than 0."""
_POSITIVE = ("alpha", "epochs", "lr", "max_drift", "max_kl")


@dataclass(frozen=True)
class TrainSettings:
    """What :func:`ipca.train.fine_tune` does.

    Args:
        model: a folder of transformers, or an id on the Hugging Face Hub.
        data: a file (``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.parquet``, ``.txt``), a folder of such files or of
            images in one folder a class, or the id of a data set on the Hub.
        task: one of :data:`TASKS`; default: what the columns of the data say.
        columns: the names of the data's columns by their role, where they cannot be found: ``text``, ``messages``,
            ``prompt``, ``completion``, ``label``, ``tokens``, ``tags``, ``image``.
        held_out: the share of the rows that is held out for evaluation, or a file.
        keep: what the model must not forget: text or rows as for ``data``, images, or a Python file whose function
            ``measure(model, processor)`` returns numbers by name. Default: for a causal language model, samples drawn
            from the model itself; else nothing is measured.
        keep_tokens: tokens of ``keep`` at most; for encoders and images, one item counts 64.
        max_kl: a budget: the largest ``KL(base ‖ tuned)`` per token on ``keep``, in nats.
        max_drift: a budget for models without a distribution to keep: the largest mean ``1 − cos`` of embeddings.
        patience: evaluations in a row above the budget after which training stops.
        rescale: where training ends above the budget, scale its change down to it, and keep that where it is better
            on the new data than every checkpoint within the budget; see :func:`ipca.train.tradeoff`.
        window, rank, alpha, targets, train, magnitude: see :class:`ipca.peft.PCConfig`. Windows that are found from
            inputs, such as ``"inputs:minor"``, take those of ``keep``.
        lr: peak learning rate; default 1e-3, for ``window="principal"`` 3e-4: places to begin.
        epochs, steps: the length; ``steps`` goes first.
        batch: rows of a step, over all processes.
        micro_batch: rows of a forward pass of one process; default: all that it has of a step.
        max_length: tokens of a sequence; longer rows are cut.
        loss_on: of chats and prompts with completions, ``"answers"`` or ``"all"`` tokens.
        packing: rows are packed into sequences of ``max_length``, see TRL; needs an attention that knows of it.
        schedule, warmup: of the learning rate; the share of the steps in which it rises, below 1.
        weight_decay: AdamW's. It pulls the factors to 0 and not to where they start, so 0 by default.
        evaluations: how many, evenly over the run.
        seed: of the order, of new heads and of samples.
        dtype: of the frozen weights; default: as stored, on a CPU float32. Factors and heads train in float32.
        gradient_checkpointing: less memory, a third more time.
        report_to: as ``TrainingArguments.report_to``: ``("tensorboard",)``, ``("wandb",)``, …

    Raises:
        TypeError, ValueError: a value has the wrong type or is out of range; the message names it.
    """

    model: str
    data: str
    task: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    held_out: float | str = 0.1
    keep: str | None = None
    keep_tokens: int = 8192
    max_kl: float | None = None
    max_drift: float | None = None
    patience: int = 3
    rescale: bool = True
    window: str = "middle"
    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    train: str = "both"
    magnitude: float | str = "sigma"
    lr: float | None = None
    epochs: float = 3.0
    steps: int | None = None
    batch: int = 16
    micro_batch: int | None = None
    max_length: int = 512
    loss_on: str = "answers"
    packing: bool = False
    schedule: str = "linear"
    warmup: float = 0.05
    weight_decay: float = 0.0
    evaluations: int = 10
    seed: int = 0
    dtype: str | None = None
    gradient_checkpointing: bool = False
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is None and each.default is not None:
                raise TypeError(f"{each.name} is empty; give a value, or leave it out for its default.")
            if isinstance(each.default, bool) and not isinstance(value, bool):
                raise TypeError(f"{each.name} must be true or false, got {value!r}.")
        for name in ("model", "data", "keep", "held_out"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} is empty; give a path or an id, or leave it out for its default.")
        for name in ("targets", "report_to"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        object.__setattr__(self, "columns", dict(self.columns))
        for name, least in _MINIMUM.items():
            value = getattr(self, name)
            if isinstance(least, int) and isinstance(value, float) and value.is_integer():
                object.__setattr__(self, name, value := int(value))  # such as 1e1
            _check(name, value, lambda value, least=least: value >= least, f"at least {least}", type(least))
        for name in _POSITIVE:
            _check(name, getattr(self, name), lambda value: value > 0, "above 0")
        _check("warmup", self.warmup, lambda value: 0 <= value < 1, "at least 0 and below 1, a share of the steps")
        choices = {"task": TASKS, "schedule": SCHEDULES, "loss_on": LOSS_ON, "dtype": DTYPES}
        for name, known in choices.items():
            if (value := getattr(self, name)) is not None and value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}.")
        share = self.held_out
        if not isinstance(share, str) and not (isinstance(share, float | int) and 0 < share < 1):
            raise ValueError(f"held_out must be a share between 0 and 1, or a file; got {share!r}.")
        if self.max_kl is not None and self.max_drift is not None:
            raise ValueError("max_kl and max_drift are budgets of different tasks; give one of them.")
        Window(self.window, self.rank)
        check_factors(self.train, self.magnitude)

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        if self.lr is not None:
            return self.lr
        return _RATE_PRINCIPAL if Window(self.window, self.rank).text == "principal" else _RATE

    @property
    def budget(self) -> float | None:
        """The limit of what is forgotten, whichever it is."""
        return self.max_drift if self.max_kl is None else self.max_kl

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`from_dict` takes."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainSettings:
        """Settings by name.

        Raises:
            ValueError: a name is unknown or missing.
            TypeError: a value has the wrong type.
        """
        known = [each.name for each in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                raise ValueError(f"there is no setting {name!r}" + (f"; did you mean {near[0]}?" if near else "."))
        missing = [name for name in ("model", "data") if not values.get(name)]
        if missing:
            raise ValueError(f"the settings lack {' and '.join(missing)}.")
        return cls(**values)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, by name; its section ``found`` is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a mapping in YAML.
    """
    values = _read(path)
    values.pop("found", None)
    return {name: float(value) if _is_float(value) else value for name, value in values.items()}


def read_found(path: Path) -> dict[str, Any]:
    """What a run has found, by name, as its file of settings says; errors as of :func:`read_settings`."""
    found: dict[str, Any] = _read(path).get("found") or {}
    return found


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not settings by name.")
    return values


def _is_float(value: Any) -> bool:
    """Whether ``value`` is a number such as 1e-3, which YAML 1.1 takes for text."""
    return isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value) is not None


def settings_text(settings: TrainSettings, found: Mapping[str, Any]) -> str:
    """YAML of ``settings``, and of what the run found out itself."""
    import yaml

    return yaml.safe_dump({**settings.to_dict(), "found": dict(found)}, sort_keys=False, allow_unicode=True)


def differing(one: TrainSettings, other: TrainSettings) -> list[str]:
    """The names of the settings in which two runs differ, except for where they report to."""
    same = replace(other, report_to=one.report_to)
    return [each.name for each in fields(one) if getattr(one, each.name) != getattr(same, each.name)]


def _check(name: str, value: Any, fits: Any, words: str, kind: type[float] = float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | kind):
        raise TypeError(f"{name} must be a {'whole ' if kind is int else ''}number, got {value!r}.")
    if not (math.isfinite(value) and fits(value)):
        raise ValueError(f"{name} must be {words}, got {value}.")
