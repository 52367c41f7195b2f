"""The commands: each returns a record for ``--json`` and the text that is printed otherwise."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import ipca
from ipca._atomic import check_writable, staged_files, staged_folder
from ipca._cache_folder import default_cache_folder
from ipca.analysis import draw_spectra, spectrum
from ipca.cli.arguments import check_output_folder, find_folders
from ipca.cli.doctor_command import doctor
from ipca.cli.init_command import init
from ipca.cli.inspect_adapter import adapter_record, adapter_table, is_adapter, mib
from ipca.cli.train_command import log_to_stderr, tradeoff, train
from ipca.cli.tune_command import tune
from ipca.io.adapter_folder import SIDECAR, OtherBaseError, OtherModelError, read_adapter
from ipca.io.model_folder import (
    copy_companions,
    example_class,
    is_weights_of_any_program,
    load_model,
    load_with_missing,
)
from ipca.io.output_folder import check_output, is_weights
from ipca.io.peft_format import WEIGHTS
from ipca.lab.names import PICTURES
from ipca.svd.cache import CacheEntry, SpectralCache

__all__ = [
    "cache",
    "convert",
    "demo",
    "doctor",
    "export",
    "init",
    "inspect",
    "merge",
    "report",
    "sweep",
    "tradeoff",
    "train",
    "tune",
]

Record = dict[str, object]


def inspect(args: argparse.Namespace) -> tuple[Record, str]:
    """Show spectra and windows of a model folder, or the contents of an adapter folder."""
    find_folders(args)
    if is_adapter(args.model):
        _check_no_window_options(args)
        record = adapter_record(args.model)
        return record, adapter_table(record)
    if args.plot:
        check_writable(args.plot.absolute().parent)
    found = spectrum(
        load_model(args.model, args.model_class),
        rank=args.rank,
        window=args.window,
        targets=args.targets,
        exclude=args.exclude,
        progress=not args.quiet,
    )
    sums = found.totals()
    text = (
        f"{found}\n{sums['layers']} layers, {sums['trainable']:,} parameters of factors "
        f"({100 * sums['share']:.2f} %); "
        f"adapter file {mib(sums['file_bytes'])}, factors in memory {mib(sums['memory_bytes'])}, "
        f"AdamW {mib(sums['adamw_bytes'])} more (float32)"
    )
    if args.plot:
        draw_spectra(found, args.plot)
        text += f"\npicture: {args.plot}"
    return {"layers": found.records(), "totals": sums}, text


def _check_no_window_options(args: argparse.Namespace) -> None:
    """Raise where an option was given that means nothing for an adapter."""
    defaults = {"rank": 16, "window": "middle", "alpha": None, "targets": None, "exclude": [], "plot": None}
    given = [f"--{name}" for name, default in defaults.items() if getattr(args, name) != default]
    if given:
        raise ValueError(f"{args.model} is an adapter, whose windows are chosen; leave out {', '.join(given)}.")


def merge(args: argparse.Namespace) -> tuple[Record, str]:
    """Merge an adapter into its model and write a plain model folder."""
    check_output(args.out, whole=True, overwrite=args.force, option="--force")
    check_output_folder(args)
    find_folders(args)
    model = _adapted_model(args, writes_model=True)
    layers = ipca.summary(model).layers
    ipca.unload(model)
    with staged_files(args.out, replaced=_is_stale) if args.force else staged_folder(args.out) as stage:
        model.save_pretrained(stage)
        copy_companions(args.model, stage)
    return {"layers": layers, "out": str(args.out)}, f"merged {layers} layers into {args.out}"


def _is_stale(name: str) -> bool:
    """Whether a file of this name must not lie beside the weights of another model."""
    return is_weights(name) or is_weights_of_any_program(name)


def export(args: argparse.Namespace) -> tuple[Record, str]:
    """Write an adapter for programs without ipca."""
    check_output_folder(args)
    check_output(args.out, whole=args.format == "residual", overwrite=args.force, option="--force")
    find_folders(args)
    model = _adapted_model(args, writes_model=args.format == "residual")
    base_model = None if args.format == "residual" else args.base
    errors = ipca.export(
        model, args.out, format=args.format, base_model=base_model, rank=args.rank, overwrite=args.force
    )
    if args.format == "residual":
        copy_companions(args.model, args.out / "base")
    record: Record = {"format": args.format, "out": str(args.out)}
    text = f"wrote the {args.format} format to {args.out}"
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        record |= {"rank": args.rank, "relative_error": errors}
        text += f"\nrank {args.rank}: the change of a weight is off by {errors[worst]:.1e} at most (Frobenius, {worst})"
    return record, text


def _adapted_model(args: argparse.Namespace, *, writes_model: bool) -> Any:
    """The model with its adapter; an error names the command or the option that helps.

    Args:
        writes_model: all of its weights will be written, so that none may be missing.
    """
    if (args.adapter / WEIGHTS).is_file() and not (args.adapter / SIDECAR).is_file():
        raise ValueError(
            f"{args.adapter} has no {SIDECAR}: it is not an adapter of ipca; "
            "for a stock LoRA that trains a window use ipca convert."
        )
    model, missing = load_with_missing(args.model, args.model_class, args.adapter)
    with _naming_class(model):
        try:
            ipca.load_adapter(model, args.adapter, check_base=not args.any_base)
        except OtherBaseError as error:
            raise ValueError(f"{error.fact}, or pass --any-base if you know that they fit.") from None
    held = tuple(f"{name}." for name in read_adapter(args.adapter).modules_to_save)
    absent = sorted(key for key in missing if not key.startswith(held))
    if absent and writes_model:
        raise ValueError(
            f"neither {args.model} nor the adapter holds {', '.join(absent[:3])}, which would be random in this "
            f"{type(model).__name__}; give the model that the adapter was trained on, or another --class."
        )
    return model


@contextmanager
def _naming_class(model: Any) -> Iterator[None]:
    """Name the option that helps where the adapter was trained on a model of another class."""
    try:
        yield
    except OtherModelError as error:
        raise ValueError(
            f"{error.fact}; name the class that the adapter was trained in, such as --class "
            f"{example_class(model.config)}."
        ) from None


def convert(args: argparse.Namespace) -> tuple[Record, str]:
    """Convert a stock PEFT LoRA into an adapter of ipca."""
    check_output_folder(args)
    check_output(args.out, overwrite=args.force, option="--force")
    find_folders(args)
    original = load_model(args.original, args.model_class, args.adapter) if args.original else None
    model = load_model(args.model, args.model_class, args.adapter)
    with _naming_class(model):
        ipca.import_peft(model, args.adapter, original=original, progress=not args.quiet)
    ipca.save_adapter(model, args.out, base_model=args.base, overwrite=args.force)
    found = ipca.summary(model)
    record: Record = {
        "layers": found.layers,
        "out": str(args.out),
        "base": args.base,
        "worst_residual": found.worst_residual,
        "uncertified": dict(found.uncertified),
    }
    return record, f"{found}\nadapter: {args.out}"


def cache(args: argparse.Namespace) -> tuple[Record, str]:
    """List, verify or prune the cache in a folder."""
    held = SpectralCache(args.cache or default_cache_folder())
    if held.folder.exists() and not held.folder.is_dir():
        raise NotADirectoryError(f"{held.folder} is not a folder; give the folder of a cache.")
    return {"list": _list_cache, "verify": _verify_cache, "prune": _prune_cache}[args.action](held, args)


def _list_cache(held: SpectralCache, args: argparse.Namespace) -> tuple[Record, str]:
    entries = held.entries()
    total = sum(entry.bytes for entry in entries)
    lines = [f"{'weight':22} {'shape':>14} {'window':>16} {'tol':>7} {'dtype':>9} {'path':>6} {'MiB':>7} {'used':>7}"]
    lines += [_entry_line(entry) for entry in entries]
    lines.append(f"{len(entries)} entries, {total / 2**20:.1f} MiB in {held.folder}")
    record: Record = {
        "folder": str(held.folder),
        "bytes": total,
        "entries": [_entry_record(entry) for entry in entries],
    }
    return record, "\n".join(lines[1:] if not entries else lines)


def _verify_cache(held: SpectralCache, args: argparse.Namespace) -> tuple[Record, str]:
    damaged = held.verify(remove=args.remove)
    if damaged and not args.remove:
        words = "; ".join(words for _, words in damaged)
        raise ValueError(
            f"{len(damaged)} entries are damaged ({words}); ipca cache verify --remove deletes them, except files "
            "without the header of an entry."
        )
    names = [path.name for path, _ in damaged]
    text = f"removed {len(names)} damaged entries from" if names else "no damaged entry in"
    return {"folder": str(held.folder), "removed": names}, f"{text} {held.folder}"


def _prune_cache(held: SpectralCache, args: argparse.Namespace) -> tuple[Record, str]:
    names = [path.name for path in held.prune(max_bytes=args.max_bytes, older_than=args.older_than)]
    return {"folder": str(held.folder), "removed": names}, f"removed {len(names)} entries from {held.folder}"


def _entry_record(entry: CacheEntry) -> Record:
    key, report = entry.key, entry.report
    return {
        "file": entry.path.name,
        "weight": key.weight,
        "shape": list(entry.shape),
        "window": key.window,
        "start": report.window.index,
        "rank": key.rank,
        "tol": key.tol,
        "dtype": key.dtype,
        "version": key.version,
        "path": report.path,
        "residual": report.residual,
        "certified": report.certified,
        "seconds": report.seconds,
        "bytes": entry.bytes,
        "used": entry.used,
    }


def _entry_line(entry: CacheEntry) -> str:
    key, window = entry.key, entry.report.window
    shape, span = " × ".join(map(str, entry.shape)), f"[{window.index}, {window.index + window.rank})"
    days = (time.time() - entry.used) / 86400
    return (
        f"{key.weight[:22]:22} {shape:>14} {span:>16} {key.tol:7.0e} {key.dtype:>9} {entry.report.path:>6} "
        f"{entry.bytes / 2**20:7.2f} {days:5.1f} d"
    )


def sweep(args: argparse.Namespace) -> tuple[Record, str]:
    """Train every window beside plain LoRA and controls; print the verdict, or with --dry-run the plan."""
    from ipca.lab import sweep as sweeps
    from ipca.lab.sweep.store import TaskChangedError

    out = args.out.absolute()  # the task may change the current folder
    command = sweeps.plan_sweep if args.dry_run else sweeps.run
    options = [name for name, each in signature(command).parameters.items() if each.kind is each.KEYWORD_ONLY]
    given = {name: value for name, value in vars(args).items() if name in options and value is not None}
    try:
        if args.dry_run:
            plan = sweeps.plan_sweep(args.task, out, overwrite=args.force, **given)
            return plan.record(), str(plan)
        rows = sweeps.run(args.task, out, progress=not args.quiet, overwrite=args.force, **given)
    except TaskChangedError as error:
        raise ValueError(f"{error.fact}; keep them with --accept-task-change, or use a new folder.") from None
    failed = [row for row in rows if row["status"] != "ok"]
    verdict = sweeps.verdict(out)
    table, page = args.out / "rows.csv", args.out / "report.html"
    text = f"{verdict}\n{len(rows)} rows, {len(failed)} failed: {table}   report: {page}"
    unreached = sorted({*(args.checkpoints or ())} - {row["step"] for row in rows})
    if unreached:
        text += f"\nno run took so many optimizer steps as --checkpoints {' '.join(map(str, unreached))}"
    record: Record = {"rows": len(rows), "failed": len(failed), "verdict": verdict, "out": str(args.out)}
    return {**record, "unreached_checkpoints": unreached}, text


def report(args: argparse.Namespace) -> tuple[Record, str]:
    """Write the report of sweeps again, or with its figures and tables as files; print the verdicts."""
    from ipca.lab import sweep as sweeps
    from ipca.lab.sweep.report.export import check_report_folder

    record: Record = {}
    if args.out is None:
        text = f"report: {sweeps.write_report(args.sweeps[0])}"
    else:
        check_report_folder(args.out, overwrite=args.force, option="--force")
        options = {"labels": args.labels, "formats": args.format or PICTURES, "overwrite": args.force}
        found = sweeps.export_report(args.sweeps, args.out, **options)
        text = f"{len(found['figures'])} figures, {len(found['tables'])} tables, rows.csv, report.html: {args.out}"
        record |= found
    verdicts = {str(folder): sweeps.verdict(folder) for folder in args.sweeps}
    said = verdicts.values() if len(verdicts) == 1 else (f"{folder}: {words}" for folder, words in verdicts.items())
    return {**record, "verdicts": verdicts, "out": str(args.out or args.sweeps[0])}, "\n".join([*said, text])


def demo(args: argparse.Namespace) -> tuple[Record, str]:
    """Fine-tune a small model on real text as ``ipca train`` does, and load the adapter elsewhere."""
    from ipca.lab.demo.run import OUTPUTS, run_demo

    check_output(args.out, whole=True, overwrite=args.force, resumes=OUTPUTS.issuperset, option="--force")
    with log_to_stderr(args.quiet):
        return run_demo(args.text, args.out, steps=args.steps, sentences=args.sentences, overwrite=args.force), ""
