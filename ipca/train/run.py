"""A run from a model and data to an adapter: it resumes, keeps what fits the budget, and writes one folder."""

from __future__ import annotations

import csv
import logging
import math
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from ipca._atomic import locked_folder, read_checksummed, staged_files, write_atomic, write_checksummed
from ipca._version import __version__
from ipca.io.adapter_folder import SIDECAR
from ipca.io.model_card import write_model_card
from ipca.io.output_folder import check_output, check_spared
from ipca.model.targets import few
from ipca.train.callback import EvaluateLast, KeepCallback, Progress
from ipca.train.checkpoints import last_checkpoint, relocate, train_from
from ipca.train.classes import base_classes
from ipca.train.data import NO_COLUMNS, Data, read_data
from ipca.train.examples import split
from ipca.train.figures import draw_run
from ipca.train.keep import Kept, KeptItems, KeptTokens, build_keep, draw_samples, read_keep
from ipca.train.models import adapt, as_it_was, fitting_length, load_model
from ipca.train.outcome import Outcome, Row, curve_of, read_curve
from ipca.train.report import write_report
from ipca.train.run_folder import CHECKPOINTS, CURVE, SAMPLES, adapter_digests, input_digests, is_run_file
from ipca.train.scaled_change import Point, save_scaled, search
from ipca.train.settings import RUN, TrainSettings, differing, read_settings, settings_text
from ipca.train.sources import find_source
from ipca.train.trainers import build_trainer, micro_batches, processes, repeated_rows
from ipca.window import Window

log = logging.getLogger("ipca.train")


class OverBudgetError(RuntimeError):
    """No checkpoint is within the budget."""


def fine_tune(settings: TrainSettings, out: Path, *, overwrite: bool = False, progress: bool = True) -> Outcome:
    """Train a window of ``settings.model`` on ``settings.data``, and write the adapter and its report to ``out``.

    ``out`` holds the adapter, which stock PEFT loads on the base; ``run.yaml`` with the settings, ``curve.csv`` and
    ``curve.png``, ``report.html`` and a model card. A run that was killed goes on from its last checkpoint when it is
    called again with the same settings. Under ``torchrun`` or ``accelerate launch`` every process calls this.

    Args:
        overwrite: replace what ``out`` holds.
        progress: show a bar, or a line an evaluation where there is no terminal.

    Raises:
        DataError: a row is not what the task needs; found before the model is loaded.
        FileExistsError: ``out`` holds something else, a run with other settings, data or base weights, or an adapter
            that is not of this run.
        RuntimeError: another process trains in ``out``.
        OverBudgetError: nothing but the base is within the budget; ``out/checkpoints`` keeps the last checkpoints.
        ImportError: a package of the extra ``train`` is missing.
        FileNotFoundError, TypeError, ValueError: there is no such model or data, or they do not fit each other.
    """
    state = _process_state()
    micro_batches(settings)
    get_reporting_integration_callbacks(list(settings.report_to))  # raises where one is not known
    out = Path(out).absolute()  # the code of `settings.keep` may change the current folder
    with locked_folder(out, "process trains") if state.is_main_process else nullcontext():
        return _fine_tune(settings, out, overwrite, progress, state)


def _fine_tune(settings: TrainSettings, out: Path, overwrite: bool, progress: bool, state: Any) -> Outcome:
    """:func:`fine_tune` in an absolute ``out`` that no other process works in."""
    if finished := _check_folder(settings, out, overwrite):
        return finished
    shown = progress and state.is_main_process
    base = base_classes(settings.model)
    data = read_data(find_source(settings.data), settings.task, settings.columns, base=base, progress=shown)
    _check_classes(out, data.labels, overwrite)
    held_out = None
    if isinstance(settings.held_out, str):
        other, task = find_source(settings.held_out), data.layout.task
        columns = {} if other.kind in NO_COLUMNS else settings.columns
        held_out = read_data(other, task, columns, labels=data.labels, progress=shown)
    source = read_keep(settings, data.layout.task, progress=shown)
    loaded = load_model(settings, data.layout.task, data.labels)
    fitted = fitting_length(settings, loaded)
    samples = None
    with as_it_was(loaded.processor):
        parts = split(data, fitted, loaded, held_out)
        if source is None and data.layout.task == "causal-lm":
            samples = _samples(loaded.model.to(state.device), loaded.processor, fitted, None if overwrite else out)
        kept = build_keep(source, fitted, data.layout.task, loaded, samples)
    inputs = None
    if Window(settings.window, settings.rank).needs_calibration:
        assert isinstance(kept, KeptTokens | KeptItems)  # read_keep has seen to it
        inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in kept.batches]
    model = adapt(loaded, settings, data.layout.task, progress and sys.stderr.isatty(), inputs)
    if state.is_main_process:
        _begin(settings, fitted, out, data.labels, samples, overwrite)
    state.wait_for_everyone()
    trainer = build_trainer(model, parts, fitted, loaded, data, out / CHECKPOINTS)
    if trainer.accelerator.num_processes != processes():  # each would train on all of the data
        known = trainer.accelerator.num_processes
        raise RuntimeError(f"{processes()} processes were started, but the Trainer knows of {known}.")
    repeated = repeated_rows(settings, len(trainer.train_dataset))
    if repeated and state.is_main_process:
        log.info("%d rows are repeated in the last step of each epoch, to fill it in all processes", repeated)
    _add_callbacks(trainer, kept, settings, progress)
    train_from(trainer, last_checkpoint(out / CHECKPOINTS))
    return _finish(trainer, settings, out, data, kept, progress)


def _process_state() -> Any:
    try:
        from accelerate import PartialState
    except ImportError:
        raise ImportError("training needs accelerate; run: pip install 'ipca-lora[train]'") from None
    return PartialState(cpu=not torch.accelerator.is_available())


def _check_folder(settings: TrainSettings, out: Path, overwrite: bool) -> Outcome | None:
    """The outcome where this run is finished already; raise where ``out`` holds anything but this run."""
    run = out / RUN
    if overwrite:
        check_spared(out, (settings.model, settings.data, settings.keep, settings.held_out))
    if not run.is_file() or overwrite:
        check_output(out, whole=True, overwrite=overwrite, option="--force")
        return None
    earlier = TrainSettings.from_dict(read_settings(run))
    different = differing(settings, earlier)
    found = _found(out)
    if found is None:
        raise FileExistsError(
            f"{run} holds settings and is no file of a run, which would replace it; give it another name, or choose "
            "another folder for the run."
        )
    begun = "kept" in found or last_checkpoint(out / CHECKPOINTS)
    if different and begun:
        words = ", ".join(
            f"{name} {_shown(getattr(earlier, name))} and not {_shown(getattr(settings, name))}" for name in different
        )
        raise FileExistsError(f"{out} holds a run with {words}; choose another folder, or replace it with --force.")
    now = {} if different else input_digests(settings)
    changed = [name for name, digest in found.get("inputs", {}).items() if now.get(name, digest) != digest]
    if changed and begun:
        words = " and ".join(f"{name} {getattr(settings, name)}" for name in changed)
        raise FileExistsError(
            f"{words} {'has' if len(changed) == 1 else 'have'} changed since the run in {out} was begun; choose "
            "another folder, or replace the run with --force."
        )
    _check_adapter(out, found)
    if "kept" not in found:
        if different or changed:
            log.info("%s holds a run that had no checkpoint yet; this one takes its place", out)
        return None
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)  # where the run was killed at its very end
    log.info("%s holds this run, finished; --force trains again", out)
    return Outcome(
        out, settings, read_curve(out / CURVE), found["kept"], found["scale"], found["metric"], found["description"]
    )


def _check_adapter(out: Path, found: dict[str, Any]) -> None:
    """Raise where the adapter in ``out`` is not what the run has ``found``: other commands may replace it."""
    was, now = found.get("adapter", {}), adapter_digests(out)
    other = sorted(name for name in {*was, *now} if was.get(name) != now.get(name))
    if "kept" in found and other:
        raise FileExistsError(
            f"the run in {out} is finished, and its adapter has been changed or replaced since ({', '.join(other)}); "
            "choose another folder to train again, or replace what is there with --force."
        )
    other = [name for name in other if name in now and name != SIDECAR]  # which holds times, too
    if other:
        raise FileExistsError(
            f"{out} holds a run that is not finished, and an adapter that is not of this run ({', '.join(other)}), "
            "which would be replaced; move the adapter elsewhere to go on, or begin the run again with --force."
        )


def _check_classes(out: Path, labels: tuple[str, ...], overwrite: bool) -> None:
    """Raise where a run that would go on was begun with other classes, as of a data set or a model on the Hub."""
    if overwrite or not last_checkpoint(out / CHECKPOINTS):
        return
    begun = tuple((_found(out) or {}).get("labels", labels))
    if begun != labels:
        raise FileExistsError(
            f"the run in {out} was begun with the classes {few([*begun], 8)}, in this order, and not with "
            f"{few([*labels], 8)}; choose another folder, or replace the run with --force."
        )


def _shown(value: Any) -> str:
    return "the default" if value is None else repr(value)


def _samples(model: Any, tokenizer: Any, settings: TrainSettings, out: Path | None) -> Tensor:
    """Samples of the model: those of this run in ``out``, or new ones."""
    if out is not None and (out / SAMPLES).is_file():
        record, tensors = read_checksummed(out / SAMPLES)
        if record == _sampled(settings):
            return tensors["input_ids"]
    log.info("drawing %d tokens from the model, to measure what it forgets", settings.keep_tokens)
    return draw_samples(model, tokenizer, settings)


def _sampled(settings: TrainSettings) -> dict[str, Any]:
    """What samples depend on."""
    names = ("model", "dtype", "keep_tokens", "max_length", "seed")
    return {name: getattr(settings, name) for name in names} | {"model_files": input_digests(settings).get("model")}


def _begin(
    settings: TrainSettings,
    fitted: TrainSettings,
    out: Path,
    labels: tuple[str, ...],
    samples: Tensor | None,
    overwrite: bool,
) -> None:
    """Write what a killed run needs to go on."""
    for path in [each for each in out.iterdir() if overwrite and is_run_file(each.name)]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if samples is not None:
        write_checksummed(out / SAMPLES, _sampled(fitted), {"input_ids": samples})
    earlier = (_found(out) or {}) if (out / RUN).is_file() else {}  # overwritten, it is gone
    own = {"adapter": earlier["adapter"]} if "adapter" in earlier else {}
    found = {"inputs": input_digests(settings), "labels": list(labels), **own}
    write_atomic(out / RUN, settings_text(settings, found).encode())
    if checkpoint := last_checkpoint(out / CHECKPOINTS):
        relocate(checkpoint)


def _add_callbacks(trainer: Any, kept: Kept | None, settings: TrainSettings, progress: bool) -> None:
    trainer.add_callback(Progress(None if kept is None else kept.metric, progress))
    trainer.add_callback(EvaluateLast())
    if kept is not None:
        trainer.add_callback(KeepCallback(trainer, kept, max_kl=settings.budget, patience=settings.patience))


def _finish(trainer: Any, settings: TrainSettings, out: Path, data: Data, kept: Kept | None, progress: bool) -> Outcome:
    rows = curve_of(trainer.state.log_history)
    name, description = (None, None) if kept is None else (kept.metric, kept.description)
    step = trainer.state.best_global_step if trainer.state.best_model_checkpoint else None
    best = next((row for row in rows if row["step"] == step), None)
    scale = 1.0
    if settings.budget is not None and settings.rescale and rows[-1][f"eval_{name}"] > settings.budget:
        scaled_row = _rescale(trainer, kept, settings, rows, last_checkpoint(out / CHECKPOINTS), progress)
        if scaled_row["scale"] and (best is None or scaled_row["eval_loss"] < best["eval_loss"]):
            best, scale = scaled_row, scaled_row["scale"]
        elif best is not None:
            trainer._load_best_model()
    if best is None:
        raise _over_budget(rows, settings, name, last_checkpoint(out / CHECKPOINTS))
    outcome = Outcome(out, settings, rows, best, scale, name, description)
    with TemporaryDirectory(dir=out / CHECKPOINTS) as folder:  # removed at the end, also where this is killed
        made = Path(folder, "made")
        trainer.save_model(str(made))
        if trainer.is_world_process_zero():
            if scale != 1:
                made = save_scaled(made, Path(folder, "scaled"), scale)
            (made / "training_args.bin").unlink(missing_ok=True)  # a pickle of what run.yaml says
            found = (_found(out) or {}) | {"adapter": adapter_digests(made)}  # first: a killed run knows its own files
            write_atomic(out / RUN, settings_text(settings, found).encode())
            for path in made.iterdir():
                path.replace(out / path.name)
            _write(outcome, trainer, data)
        trainer.accelerator.wait_for_everyone()
    return outcome


def _rescale(
    trainer: Any, kept: Any, settings: TrainSettings, rows: list[Row], checkpoint: Path | None, progress: bool
) -> Row:
    """The measurements of the last checkpoint with its change scaled down to the budget."""
    assert checkpoint is not None
    name, last = f"eval_{kept.metric}", rows[-1]
    at = {0.0: rows[0], 1.0: last} if rows[0]["step"] == 0 else {1.0: last}
    known = {scale: Point(scale, row["eval_loss"], row[name]) for scale, row in at.items()}
    log.info("scaling the change of step %d down to the budget of %g", last["step"], settings.budget)
    trainer._load_from_checkpoint(str(checkpoint))
    best = search(trainer, kept, known, (0.25, 0.5, 0.75), settings.budget, progress).best
    return {"step": last["step"], "scale": best.scale, "eval_loss": best.loss, name: best.forgotten}


def _over_budget(rows: list[Row], settings: TrainSettings, name: str | None, checkpoint: Path | None) -> Exception:
    trained = [row for row in rows if row["step"] and math.isfinite(row.get(f"eval_{name}", math.nan))]
    if settings.budget is None or not trained:
        return RuntimeError("no evaluation gave a finite loss: the run diverged. Train at a lower rate.")
    least = min(trained, key=lambda row: row[f"eval_{name}"])
    return OverBudgetError(
        f"no checkpoint is within the budget of {settings.budget:g}: the least {name} was "
        f"{least[f'eval_{name}']:.4g}, at step {least['step']:.0f}. Train at a lower rate, raise the budget, or let "
        f"ipca tradeoff scale {checkpoint} down."
    )


def _write(outcome: Outcome, trainer: Any, data: Data) -> None:
    """The files beside the adapter; ``run.yaml``, which says that the run is finished, last."""
    out, settings, rows = outcome.out, outcome.settings, outcome.rows
    names = list(dict.fromkeys(name for row in (rows[-1], *rows) for name in row))
    with staged_files(out) as stage, (stage / CURVE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for ending in ("png", "svg"):
        draw_run(rows, out / f"curve.{ending}", outcome.best, outcome.metric, outcome.description, settings.budget)
    start = f"`{settings.window}`, rank {settings.rank}, {trainer.state.max_steps} steps, peak rate {settings.rate:g}"
    write_model_card(
        out,
        data=f"{settings.data} ({data.layout.task}); window {start}. ![The run](curve.png)",
        metrics={
            f"{name} at {outcome.kept_step_text}": value for name, value in outcome.best.items() if name[:4] == "eval"
        },
        overwrite=True,
    )
    write_report(outcome, out / "report.html", data.layout.task)
    versions = {name: _version(name) for name in ("torch", "transformers", "peft", "trl", "datasets")}
    found = (_found(out) or {}) | {
        "task": data.layout.task,
        "columns": dict(data.layout.columns),
        "labels": list(data.labels),
        "lr": settings.rate,
        "steps": trainer.state.max_steps,
        "kept": outcome.best,
        "scale": outcome.scale,
        "metric": outcome.metric,
        "description": outcome.description,
        "versions": {"ipca": __version__, **versions},
    }
    write_atomic(out / RUN, settings_text(settings, found).encode())
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)


def _found(out: Path) -> dict[str, Any] | None:
    """What ``run.yaml`` says that the run in ``out`` has found; None where a user has written that file."""
    import yaml

    found: dict[str, Any] | None = yaml.safe_load((out / RUN).read_text(encoding="utf-8")).get("found")
    return found


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None
