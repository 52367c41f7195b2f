"""The trade-off after training: the trained change scaled by λ, its loss on new data against what is forgotten.

The change of a weight, ``scaling · (B A − B0 A0)``, is linear in ``scaling = alpha / r``, so a scaled adapter is the
same file with another ``lora_alpha``. Scaling the change of a fine-tuned model is WiSE-FT (Wortsman et al., arXiv
2109.01903); PEFT's ``rescale_adapter_scale`` does it for a factor that is known.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ipca._atomic import staged_folder
from ipca.analysis.without_adapter import change_of_the_base, check_base
from ipca.io.adapter_folder import SIDECAR
from ipca.io.peft_format import CONFIG, WEIGHTS
from ipca.train.keep import Kept, as_kept
from ipca.train.run_folder import BESIDE

log = logging.getLogger("ipca.train")
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
_SEARCH, _CLOSE = 4, 0.97
"""Measurements that look for the scale of a budget at most, and the share of it at which the search ends."""


@dataclass(frozen=True)
class Point:
    """The model whose change is scaled by ``scale``: its loss on the new data, and what it has forgotten."""

    scale: float
    loss: float
    forgotten: float


@dataclass(frozen=True)
class Tradeoff:
    """The measured points, by scale, and the best one.

    Attributes:
        points: at the scales that were asked for, and at those that the search for the budget added.
        description: of ``forgotten``, with its unit.
        budget: the limit of ``forgotten``, None without one.
        best: of the points within the budget that with the lowest loss.
    """

    points: tuple[Point, ...]
    description: str
    budget: float | None = None
    best: Point = field(init=False)

    def __post_init__(self) -> None:
        within = [each for each in self.points if self.budget is None or each.forgotten <= self.budget]
        object.__setattr__(self, "best", min(within, key=lambda each: (each.loss, each.scale)))

    def rows(self) -> list[dict[str, float]]:
        """The points as mappings."""
        return [vars(point) for point in self.points]

    def __str__(self) -> str:
        lines = [f"{'scale':>7} {'loss':>9} {'forgotten':>10}   forgotten: {self.description}"]
        for each in self.points:
            mark = "  <- best" + (" within the budget" if self.budget is not None else "") if each == self.best else ""
            lines.append(f"{each.scale:7.3f} {each.loss:9.4f} {each.forgotten:10.4g}{mark}")
        return "\n".join(lines)


def tradeoff(
    trainer: Any,
    kept: Kept | Iterable[Mapping[str, Tensor]],
    *,
    scales: Sequence[float] = SCALES,
    max_forgotten: float | None = None,
    progress: bool = True,
) -> Tradeoff:
    """Measure ``trainer``'s model with its change scaled by each of ``scales``.

    ::

        print(tradeoff(trainer, batches, max_forgotten=0.1))

    With a budget, the largest scale within it is searched for on the curve through the measured points and measured
    itself. ``scale=0`` is the base and ``scale=1`` the adapter, both to the bit.

    Args:
        trainer: with an evaluation set, and a PeftModel with one active LoRA, of ipca or stock.
        kept: as for :class:`ipca.train.KeepCallback`.
        scales: 0 is always measured.
        max_forgotten: the budget: KL in nats per token, or drift.
        progress: show a bar.

    Raises:
        TypeError: the model has no LoRA.
        ValueError: the adapter's change is not linear in its scale, or the base is not what is left without it;
            ``kept`` measures nothing that could be drawn against the loss; the trainer has several evaluation sets; or
            the budget is below 0.
    """
    return search(trainer, as_kept(kept), {}, scales, max_forgotten, progress)


def search(
    trainer: Any,
    kept: Kept,
    known: Mapping[float, Point],
    scales: Iterable[float],
    budget: float | None,
    progress: bool,
) -> Tradeoff:
    """As :func:`tradeoff`, beside ``known`` points that were measured before."""
    from tqdm import tqdm

    if kept.metric is None:
        raise ValueError(f"a trade-off needs KL or drift, not {kept.description}.")
    if budget is not None and not budget >= 0:
        raise ValueError(f"a budget must be at least 0, got {budget}.")
    if isinstance(trainer.eval_dataset, Mapping):
        raise ValueError(
            f"a trade-off has one held-out loss, and the trainer has the evaluation sets "
            f"{', '.join(map(str, trainer.eval_dataset))}; set its eval_dataset to one of them."
        )
    name = kept.metric
    check_linear(trainer.model)
    bar = tqdm(total=None, desc="Trade-off", unit="scale", disable=None if progress else True)

    def measure(scale: float) -> Point:
        with scaled(trainer.model, scale):
            loss = _held_out_loss(trainer)
            forgotten = kept.measure(trainer.model)[name]  # above 0 at 0 too where more than a LoRA is trained
        bar.update()
        if progress and not sys.stderr.isatty():
            log.info("scale %g  held-out %.4g  %s %.4g", scale, loss, name, forgotten)
        return Point(scale, loss, forgotten)

    points = dict(known)
    points |= {scale: measure(scale) for scale in sorted({0.0, *map(float, scales)} - set(known))}
    if budget is not None and not points[0.0].forgotten <= budget:
        raise ValueError(
            f"at scale 0 the model has forgotten {points[0.0].forgotten:.4g}, more than the budget of {budget:g}: "
            "modules that train whole are not scaled. Raise the budget, or train without them."
        )
    for _ in range(_SEARCH if budget is not None else 0):
        wanted = _next_scale(points.values(), budget)
        if wanted is None or any(abs(wanted - scale) < 1e-3 for scale in points):
            break
        points[wanted] = measure(wanted)
    bar.close()
    return Tradeoff(tuple(points[scale] for scale in sorted(points)), kept.description, budget)


def _held_out_loss(trainer: Any) -> float:
    """The loss of an evaluation that no callback hears of, and no log."""
    handler, history = trainer.callback_handler, trainer.state.log_history
    callbacks, handler.callbacks = handler.callbacks, []
    trainer.state.log_history = []
    try:
        loss: float = trainer.evaluate()["eval_loss"]
    finally:
        handler.callbacks, trainer.state.log_history = callbacks, history
    return loss


def _next_scale(points: Iterable[Point], budget: float | None) -> float | None:
    """A scale a little below that at which the interpolated curve crosses the budget; None where it does not."""
    import numpy as np
    from scipy.interpolate import PchipInterpolator

    assert budget is not None
    found = sorted((each.scale, each.forgotten) for each in points if math.isfinite(each.forgotten))
    above = [scale for scale, value in found if value > budget]
    if not above:
        return None
    first = min(above)
    lower, reached = max((scale, value) for scale, value in found if scale < first)
    if reached >= _CLOSE * budget:
        return None
    curve = PchipInterpolator(*map(np.array, zip(*found, strict=True)))
    at = np.linspace(lower, first, 1001)
    inside = at[curve(at) <= 0.995 * budget]
    return float(np.floor(inside[-1] * 1000) / 1000) if len(inside) else None


@contextmanager
def scaled(model: nn.Module, scale: float) -> Iterator[None]:
    """Scale the change of every LoRA layer of ``model`` within the block; 1 leaves all as it is."""
    from peft.helpers import rescale_adapter_scale

    with rescale_adapter_scale(model, scale):
        yield


def check_linear(model: Any) -> None:
    """Raise where ``model`` is not its base plus a change that scales with ``lora_alpha``."""
    from peft import LoraConfig, PeftModel

    if not isinstance(model, PeftModel):
        raise TypeError(f"expected a PeftModel, got a {type(model).__name__}.")
    check_base(model)
    for name in model.active_adapters:
        config = model.peft_config[name]
        if not isinstance(config, LoraConfig):
            raise TypeError(f"the adapter {name!r} is a {type(config).__name__}; only a LoRA can be scaled.")
        _check_config(vars(config), name)


def save_scaled(adapter: str | os.PathLike[str], out: str | os.PathLike[str], scale: float) -> Path:
    """Write the adapter in the folder ``adapter`` to ``out`` with its change scaled: ``lora_alpha`` times ``scale``.

    The tensors are copied as they are, so nothing is rounded.

    Args:
        adapter: a folder of PEFT with a LoRA, also of :func:`ipca.save_adapter`.
        out: a new folder, or an empty one.
        scale: above 0.

    Returns:
        ``out``.

    Raises:
        FileNotFoundError: ``adapter`` holds no adapter.
        FileExistsError: ``out`` is not empty.
        TypeError, ValueError: the adapter is no LoRA, or its change is not linear in its scale; or ``scale`` is not
            positive.
    """
    source = Path(adapter)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be above 0, got {scale}; the base is the model without an adapter.")
    for name in (CONFIG, WEIGHTS):
        if not (source / name).is_file():
            raise FileNotFoundError(f"{source} has no {name}: it is no adapter folder.")
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise TypeError(f"{source} holds a {config.get('peft_type')}; only a LoRA can be scaled.")
    _check_config(config, str(source))
    config["lora_alpha"] *= scale
    config["alpha_pattern"] = {key: value * scale for key, value in (config.get("alpha_pattern") or {}).items()}
    with staged_folder(Path(out)) as stage:
        for path in source.iterdir():
            if path.is_file() and path.name not in (CONFIG, SIDECAR, *BESIDE):
                (stage / path.name).write_bytes(path.read_bytes())
        _write_json(stage / CONFIG, config)
        if (source / SIDECAR).is_file():
            sidecar = json.loads((source / SIDECAR).read_text(encoding="utf-8"))
            for layer in sidecar["layers"].values():
                layer["alpha"] *= scale
            _write_json(stage / SIDECAR, sidecar)
    return Path(out)


def _check_config(config: Mapping[str, Any], name: str) -> None:
    for option in ("use_dora", "lora_bias"):
        if config.get(option):
            raise ValueError(f"the adapter {name!r} has {option}: its change is not linear in its scale.")
    if config.get("bias") not in (None, "none"):
        raise ValueError(f"the adapter {name!r} has bias={config['bias']!r}: its biases would not be scaled.")
    why = change_of_the_base(config)
    if why:
        raise ValueError(f"the adapter {name!r} {why}.")


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")
