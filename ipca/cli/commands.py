"""What each command does; every one returns a record for ``--json`` and prints for people otherwise."""

from __future__ import annotations

import argparse
from inspect import signature

import ipca
from ipca._atomic import check_writable, staged_folder
from ipca.analysis import draw_spectra, spectrum
from ipca.cli import adapters, spectra
from ipca.cli.cache import cache
from ipca.cli.choice import check_no_window_options, check_output_folder
from ipca.cli.completion import completion
from ipca.cli.init import init
from ipca.io.model_folder import copy_companions, load_model

__all__ = ["cache", "completion", "convert", "demo", "export", "init", "inspect", "merge", "sweep"]

Record = dict[str, object]


def inspect(args: argparse.Namespace) -> tuple[Record, str]:
    """Spectra and windows of a model folder, or what an adapter folder holds."""
    if adapters.is_adapter(args.model):
        check_no_window_options(args, f"{args.model} is an adapter, whose windows are chosen")
        record = adapters.inspect_adapter(args.model)
        return record, adapters.render(record)
    if args.plot:
        check_writable(args.plot.absolute().parent)
    model = load_model(args.model)
    found = spectrum(
        model,
        rank=args.rank,
        window=args.window,
        targets=args.targets,
        exclude=args.exclude,
        progress=not args.quiet,
    )
    text = spectra.render(found)
    if args.plot:
        draw_spectra(found, args.plot)
        text += f"\npicture: {args.plot}"
    return {"layers": found.records(), "totals": found.totals()}, text


def merge(args: argparse.Namespace) -> tuple[Record, str]:
    """Fold an adapter into its model and write a plain model folder."""
    check_writable(args.out, empty=True)
    model = ipca.load_adapter(load_model(args.model), args.adapter, check_base=not args.any_base)
    layers = ipca.summary(model).layers
    ipca.unload(model)
    with staged_folder(args.out) as stage:
        model.save_pretrained(stage)  # type: ignore[operator]
        copy_companions(args.model, stage)
    return {"layers": layers, "out": str(args.out)}, f"merged {layers} layers into {args.out}"


def export(args: argparse.Namespace) -> tuple[Record, str]:
    """Write an adapter for programs without ipca."""
    check_writable(args.out, empty=args.form == "residual")
    check_output_folder(args)
    model = ipca.load_adapter(load_model(args.model), args.adapter, check_base=not args.any_base)
    base_model = None if args.form == "residual" else str(args.model)
    errors = ipca.export(model, args.out, form=args.form, base_model=base_model, rank=args.rank)
    if args.form == "residual":
        copy_companions(args.model, args.out / "base")
    record: Record = {"form": args.form, "out": str(args.out)}
    text = f"wrote the {args.form} form to {args.out}"
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        record |= {"rank": args.rank, "relative_error": errors}
        text += f"\nrank {args.rank}: the change of a weight is off by {errors[worst]:.1e} at most (Frobenius, {worst})"
    return record, text


def convert(args: argparse.Namespace) -> tuple[Record, str]:
    """Read a stock PEFT LoRA and write it as an adapter of ipca."""
    check_writable(args.out)
    check_output_folder(args)
    original = load_model(args.original) if args.original else None
    model = load_model(args.model)
    ipca.import_peft(model, args.adapter, original=original, progress=not args.quiet)
    ipca.save_adapter(model, args.out, base_model=str(args.original or args.model))
    found = ipca.summary(model)
    record: Record = {
        "layers": found.layers,
        "out": str(args.out),
        "base": str(args.original or args.model),
        "worst_residual": found.worst_residual,
        "uncertified": dict(found.uncertified),
    }
    return record, f"{found}\nadapter: {args.out}"


def sweep(args: argparse.Namespace) -> tuple[Record, str]:
    """Train every window beside plain LoRA and controls; print the verdict."""
    from ipca.lab import sweep as sweeps

    options = [name for name, each in signature(sweeps.run).parameters.items() if each.kind is each.KEYWORD_ONLY]
    given = {name: value for name, value in vars(args).items() if name in options and value is not None}
    rows = sweeps.run(args.task, args.out, progress=not args.quiet, **given)
    failed = [row for row in rows if row["status"] != "ok"]
    verdict = sweeps.verdict(args.out)
    table, page = args.out / "rows.csv", args.out / "report.html"
    text = f"{verdict}\n{len(rows)} rows, {len(failed)} failed: {table}   report: {page}"
    return {"rows": len(rows), "failed": len(failed), "verdict": verdict, "out": str(args.out)}, text


def demo(args: argparse.Namespace) -> tuple[Record, str]:
    """Train four ways on real text; prints as it goes."""
    from ipca.lab.demo import run_demo

    return run_demo(args.text, args.out, seeds=args.seeds, steps=args.steps, sentences=args.sentences), ""
