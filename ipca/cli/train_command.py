"""The commands ``ipca train`` and ``ipca tradeoff``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipca._atomic import check_writable, staged_files
from ipca.io.adapter_folder import SIDECAR
from ipca.io.hub import adapter_folder
from ipca.io.model_card import write_model_card
from ipca.io.output_folder import check_output, check_spared

if TYPE_CHECKING:
    from ipca.train import TrainSettings

Record = dict[str, object]
log = logging.getLogger("ipca.train")
RANK = int(os.environ.get("RANK", 0))
"""Of this process, under torchrun; only that of rank 0 prints."""
OVER_BUDGET = 2
"""Exit status with ``--gate`` where the budget is broken."""


def train(args: argparse.Namespace) -> tuple[Record | None, str]:
    """Train a window of a model on a file of data, and measure what it forgets."""
    settings = _settings(args)
    _check_packages()
    with log_to_stderr(args.quiet):
        from ipca.train.report import summary
        from ipca.train.run import OverBudgetError, fine_tune

        try:
            outcome = fine_tune(settings, args.out, overwrite=args.force, progress=not args.quiet)
        except OverBudgetError as error:
            if not args.gate:
                raise
            args.status = OVER_BUDGET
            return (None, "") if RANK else ({"out": str(args.out), "within_budget": False}, str(error))
    if RANK:
        return None, ""
    text = f"{summary(outcome)}\nadapter: {args.out}   report: {args.out / 'report.html'}"
    return outcome.record(), text


def tradeoff(args: argparse.Namespace) -> tuple[Record, str]:
    """Scale a trained change, and show its loss on new data against what is forgotten."""
    settings = _settings(args)
    _check_packages()
    with log_to_stderr(args.quiet):
        from ipca.train.evaluation import open_adapter
        from ipca.train.figures import draw_tradeoff
        from ipca.train.run_folder import is_run_file
        from ipca.train.scaled_change import SCALES, save_scaled, tradeoff

        if args.plot:
            check_writable(args.plot.absolute().parent)
        if args.out is not None:
            if args.force:
                check_spared(args.out, (args.model, args.data, args.keep))
            check_output(args.out, whole=True, overwrite=args.force, option="--force")
        adapter = adapter_folder(args.adapter)
        settings = _measured_as_in(adapter, settings, args)
        scales = {*(args.scales or (SCALES if args.scale is None else (0.0, 1.0)))}
        scales |= ({args.scale} if args.scale else set()) | ({1.0} if args.gate else set())
        progress = not args.quiet and not args.json
        with open_adapter(settings, adapter, check_base=not args.any_base, progress=progress) as (trainer, kept):
            if kept is None:
                raise ValueError(f"give --keep: nothing is measured by default for {settings.data}.")
            found = tradeoff(
                trainer,
                kept,
                scales=sorted(scales),
                max_forgotten=settings.budget,
                progress=progress,
            )
    chosen = found.best.scale if args.scale is None else args.scale
    at_one = next((point.forgotten for point in found.points if point.scale == 1.0), None)
    if args.gate and settings.budget is not None and (at_one is None or not at_one <= settings.budget):
        args.status = OVER_BUDGET
    text = str(found)
    if args.out is not None and chosen:
        with staged_files(args.out, replaced=is_run_file) as stage:  # the adapter may be what is replaced
            save_scaled(adapter, stage, chosen)
        point = next(point for point in found.points if point.scale == chosen)
        if settings.budget is not None and point.forgotten > settings.budget:
            text += f"\nabove the budget of {settings.budget:g}: the scale of {chosen:g} was asked for"
        if (args.out / SIDECAR).is_file():
            metrics = {"held-out loss": point.loss, f"forgotten, {found.description}": point.forgotten}
            write_model_card(
                args.out, data=f"The adapter in {args.adapter} with its change scaled by {chosen:g}.", metrics=metrics
            )
        text += f"\nadapter with the change scaled by {chosen:g}: {args.out}"
    if args.plot:  # last, as it may be in the folder
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        draw_tradeoff(found.rows(), args.plot, found.description, chosen)
        text += f"\npicture: {args.plot}"
    if args.out is not None and not chosen:
        raise ValueError("only the base itself is within the budget; no adapter was written. Raise the budget.")
    record: Record = {"points": found.rows(), "best": vars(found.best), "scale": chosen, "forgotten": found.description}
    return record | ({"out": str(args.out)} if args.out else {}), text


def _settings(args: argparse.Namespace) -> TrainSettings:
    """The settings of --config, over which those of the command line go."""
    from ipca.train.settings import RUN, TrainSettings, read_settings

    config = getattr(args, "config", None)
    if getattr(args, "resume", False):
        if not (args.out / RUN).is_file():
            raise FileNotFoundError(f"{args.out} holds no {RUN}: there is no run to go on with.")
        config = config or args.out / RUN
    values = read_settings(config) if config else {}
    known = {each.name for each in fields(TrainSettings)}
    given = {name: value for name, value in vars(args).items() if name in known and value is not None}
    given |= {name: str(given[name]) for name in ("model", "data") if name in given}
    missing = [name.upper() for name in ("model", "data") if name not in {**values, **given}]
    if missing:
        them = "them" if len(missing) > 1 else "it"
        args.fail(f"give {' and '.join(missing)}, or --config with a file that names {them}")
    return TrainSettings.from_dict({**values, **given})


def _measured_as_in(adapter: Path, settings: TrainSettings, args: argparse.Namespace) -> TrainSettings:
    """``settings`` with what decides how the run of ``adapter`` measured, where the command line does not say it."""
    from ipca.train.data import NO_COLUMNS
    from ipca.train.settings import RUN, TrainSettings, read_found, read_settings
    from ipca.train.sources import find_source

    if not (adapter / RUN).is_file():
        return settings
    run = read_settings(adapter / RUN)
    run["task"] = read_found(adapter / RUN).get("task", run.get("task"))
    names = ["max_length", "keep_tokens", "seed", "loss_on", "task", "dtype", "packing"]
    names += [] if args.batch else ["batch", "micro_batch"]  # a language model's loss is a mean over passes
    names += [] if find_source(settings.data).kind in NO_COLUMNS else ["columns"]
    unsaid = [name for name in names if getattr(args, name, None) is None]
    found = {name: run[name] for name in unsaid if name in run and run[name] != getattr(settings, name)}
    if found:
        log.info(
            "as in the run of %s: %s", adapter, ", ".join(f"{name} {_words(value)}" for name, value in found.items())
        )
    return TrainSettings.from_dict({**settings.to_dict(), **found})


def _words(value: Any) -> str:
    return " ".join(f"{role}={name}" for role, name in value.items()) if isinstance(value, dict) else str(value)


def _check_packages() -> None:
    """Raise ImportError where a package of the extra ``train`` is missing; none of them is imported."""
    absent = [name for name in ("transformers", "peft", "trl", "datasets", "matplotlib") if find_spec(name) is None]
    if absent:
        raise ImportError(f"this command needs {', '.join(absent)}; run: pip install 'ipca-lora[train]'")


@contextmanager
def log_to_stderr(quiet: bool) -> Iterator[None]:
    """Lines of ipca's log on stderr, and nothing of transformers' and PEFT's that users cannot act on."""
    from transformers.utils import logging as hf_logging

    logger, handler = logging.getLogger("ipca"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("ipca: %(message)s"))
    before: Any = logger.level, hf_logging.get_verbosity()
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR if RANK else logging.WARNING if quiet else logging.INFO)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        hf_logging.set_verbosity(before[1])
