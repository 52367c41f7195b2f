"""What each command does; every one returns a record for ``--json`` and prints for people otherwise."""

from __future__ import annotations

import argparse

import ipca
from ipca.cli import spectra
from ipca.cli.cache import cache
from ipca.cli.choice import chosen_config
from ipca.cli.folder import copy_companions, load_model
from ipca.cli.init import init
from ipca.io import check_target, staged_files, staged_folder

__all__ = ["cache", "demo", "export", "init", "inspect", "merge"]

Record = dict[str, object]


def inspect(args: argparse.Namespace) -> tuple[Record, str]:
    """Spectra and windows of a model folder."""
    if args.plot:
        check_target(args.plot.absolute().parent)
    model = load_model(args.model)
    rows = spectra.inspect_model(model, chosen_config(args))
    sums = spectra.totals(rows, model)
    text = spectra.render(rows, sums)
    if args.plot:
        with staged_files(args.plot.absolute().parent) as stage:
            spectra.draw(rows, stage / args.plot.name)
        text += f"\npicture: {args.plot}"
    return {"layers": [row.record() for row in rows], "totals": sums}, text


def merge(args: argparse.Namespace) -> tuple[Record, str]:
    """Fold an adapter into its model and write a plain model folder."""
    check_target(args.out, empty=True)
    model = ipca.load_adapter(load_model(args.model), args.adapter, check_base=not args.any_base)
    layers = ipca.summary(model).layers
    ipca.unload(model)
    with staged_folder(args.out) as stage:
        model.save_pretrained(stage)  # type: ignore[operator]
        copy_companions(args.model, stage)
    return {"layers": layers, "out": str(args.out)}, f"merged {layers} layers into {args.out}"


def export(args: argparse.Namespace) -> tuple[Record, str]:
    """Write an adapter for programs without ipca."""
    check_target(args.out, empty=args.form == "residual")
    model = ipca.load_adapter(load_model(args.model), args.adapter, check_base=not args.any_base)
    base_model = str(args.model) if args.form == "peft" else None
    ipca.export(model, args.out, form=args.form, base_model=base_model)
    if args.form == "residual":
        copy_companions(args.model, args.out / "base")
    return {"form": args.form, "out": str(args.out)}, f"wrote the {args.form} form to {args.out}"


def demo(args: argparse.Namespace) -> tuple[Record, str]:
    """Train four ways on real text; prints as it goes."""
    from ipca.demo import demo as run_demo

    return run_demo(args.text, args.out, seeds=args.seeds, steps=args.steps, sentences=args.sentences), ""
