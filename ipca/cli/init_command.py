"""``ipca init``: the adapter of a model folder before training, layer by layer, in one process or several."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, replace

import torch

import ipca
from ipca.cli.arguments import check_output_folder, find_folders
from ipca.io.adapter_folder import SIDECAR
from ipca.io.checkpoint import Checkpoint
from ipca.io.model_folder import copy_companions, load_with_missing, model_digest
from ipca.io.output_folder import check_output
from ipca.io.peft_format import NOT_CALLED, LayerFormat, readable_config, warn_of_reads
from ipca.model.settings import AdapterSettings
from ipca.model.targets import Target, few, find_modules_to_save, find_targets
from ipca.model.weight_reads import weight_reads
from ipca.nn.initialization import warn_null
from ipca.nn.registry import get_layer
from ipca.offline.adapter_files import write_adapter, write_residual
from ipca.offline.decompose import FinishedLayer, decompose_layers, install_layers
from ipca.offline.ranks import PeerFailed, Ranks
from ipca.offline.skeleton import NotStreamable, build_skeleton, checkpoint_keys, whole_module_keys
from ipca.offline.source import CheckpointSource, ModelSource, Source
from ipca.offline.work_folder import DONE, WORK, WorkFolder
from ipca.svd.cache import SpectralCache

Record = dict[str, object]


@dataclass(frozen=True)
class Plan:
    """What to decompose, and from where; ``loaded_whole`` says why the whole model is in memory, None if it is not."""

    source: Source
    targets: list[Target]
    modules_to_save: list[str]
    loaded_whole: str | None


def init(args: argparse.Namespace) -> tuple[Record | None, str]:
    """Write the adapter of a model folder before training.

    Under torchrun the processes share the layers, and only the first returns a record.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but this torch sees no GPU; leave it out.")
    ranks, work = Ranks.from_environment(args.device), WorkFolder(args.out, overwrite=args.force)
    try:
        record, text = _run(args, ranks, work)
    except BaseException as error:
        if isinstance(error, PeerFailed) and not ranks.is_main:  # the first process reports it
            raise SystemExit(1) from None
        kept = work.abandon() if ranks.is_main else work.count()
        if kept:
            print(
                f"ipca: {kept} finished layers are kept in {work.folder}; run the same command again to resume",
                file=sys.stderr,
            )
        if not ranks.is_main and isinstance(error, (ValueError, TypeError, RuntimeError, OSError)):
            raise RuntimeError(f"process {ranks.rank}: {error}") from error
        raise
    ranks.close()
    return (record, text) if ranks.is_main else (None, "")


def _run(args: argparse.Namespace, ranks: Ranks, work: WorkFolder) -> tuple[Record, str]:
    began = time.perf_counter()
    if not ranks.is_main:
        ranks.barrier()  # an error of the first process's checks ends the others too
    settings = _settings(args)
    if ranks.is_main:
        _check_folders(args, work)
    find_folders(args)
    plan = _plan(args, settings)
    if ranks.is_main:
        model = {"model": model_digest(args.model), "class": type(plan.source.model).__name__}
        if not work.ready:
            _check_with_peft(plan, residual=args.form == "residual")
        work.open({"format": 2, "ipca": ipca.__version__, **model, **asdict(settings)})
        ranks.barrier()
    ready, cache = ranks.broadcast(work.ready), _cache(args)
    layers, before = decompose_layers(
        plan.source, plan.targets, settings, work, ranks, device=args.device, cache=cache, progress=not args.quiet
    )
    install_layers(plan.source.model, layers, work, plan.modules_to_save)
    if not ready:
        _assemble(args, plan, layers, work, ranks)
    ranks.barrier()
    if ranks.is_main:
        work.finish()
    ranks.barrier()
    if ranks.is_main and args.train == "A":  # otherwise they train, and the account names them
        warn_null({layer.target.name: layer.null for layer in layers}, args.train)
    hits = ranks.sum(cache.hits if cache else 0)
    return _account(args, plan, layers, before, hits, time.perf_counter() - began)


def _settings(args: argparse.Namespace) -> AdapterSettings:
    """The options of layers and windows as one record."""
    if args.form == "residual" and args.train != "both":
        raise ValueError(
            f"--train {args.train} is lost with --form residual, which writes a stock LoRA that trains both factors; "
            "leave one of them out."
        )
    return AdapterSettings(
        rank=args.rank,
        window=args.window,
        alpha=args.alpha,
        form=args.form,
        targets=args.targets or "all-linear",
        exclude=args.exclude,
        tol=args.tol,
        train=args.train,
        magnitude=args.magnitude,
    )


def _plan(args: argparse.Namespace, settings: AdapterSettings) -> Plan:
    """Read the model's skeleton, or the whole model where a skeleton is not enough."""
    folder = args.model
    try:
        checkpoint = Checkpoint.open(folder)
        if checkpoint is None:
            raise NotStreamable("the folder holds no safetensors")
        model = build_skeleton(folder, checkpoint, args.model_class)
        saved = find_modules_to_save(model, settings)
        targets = find_targets(model, settings, modules_to_save=saved, values=False)
        keys = checkpoint_keys(model, targets, checkpoint, residual=settings.form == "residual")
        source = CheckpointSource(model, checkpoint, keys, whole_module_keys(model, saved, checkpoint))
        return Plan(source, targets, saved, None)
    except NotStreamable as error:
        why = str(error)
    model, missing = load_with_missing(folder, args.model_class)
    saved = find_modules_to_save(model, settings)
    targets = find_targets(model, settings, modules_to_save=saved)
    absent = [target.name for target in targets if f"{target.name}.weight" in missing]
    if absent:
        names = ", ".join(absent[:3])
        raise ValueError(
            f"{folder} holds no weight for {names}, and transformers would initialize it at random; exclude it."
        )
    return Plan(ModelSource(model), targets, saved, why)


def _check_with_peft(plan: Plan, *, residual: bool) -> None:
    """Raise, or warn, where PEFT will not read the adapter; nothing has been decomposed yet."""
    model = plan.source.model
    layers = {
        target.name: LayerFormat.of_target(target, get_layer(model, target.name), doubled=not residual)
        for target in plan.targets
    }
    whole = {name: model.get_submodule(name) for name in plan.modules_to_save}
    readable_config(model, layers, whole, others=residual)
    uncalled = weight_reads(model, layers).uncalled
    if uncalled and residual:
        raise ValueError(
            f"{few(uncalled)}: {NOT_CALLED}, and W_res alone is wrong; --exclude them, or use the default form."
        )
    if uncalled:
        warnings.warn(f"{few(uncalled)}: {NOT_CALLED}; --exclude them, or use ipca itself.", stacklevel=2)
    if residual:
        warn_of_reads(model, layers, "--exclude them, or use the default form")


def _assemble(
    args: argparse.Namespace, plan: Plan, layers: list[FinishedLayer], work: WorkFolder, ranks: Ranks
) -> None:
    """Write the output files into the work folder."""
    if args.form == "residual":
        write_residual(plan.source, layers, work, ranks, str(args.out.absolute() / "base"))
        if ranks.is_main:
            with work.writing():
                copy_companions(args.model, work.final / "base")
    elif ranks.is_main:
        write_adapter(plan.source, layers, work, work.final, base_model=args.base)


def _account(
    args: argparse.Namespace,
    plan: Plan,
    layers: list[FinishedLayer],
    before: int,
    hits: int,
    seconds: float,
) -> tuple[Record, str]:
    """The record and the text of the finished command."""
    null = tuple((layer.target.name, *layer.null) for layer in layers if layer.null[0])
    summary = replace(ipca.summary(plan.source.model), null=null)  # the model may have no values
    paths = Counter(layer.saved.svd["path"] for layer in layers if layer.saved.svd)
    record: Record = {
        "layers": summary.layers,
        "trainable": summary.trainable,
        "out": str(args.out),
        "seconds": seconds,
        "svd_seconds": summary.svd_seconds,
        "paths": dict(paths),
        "worst_residual": summary.worst_residual,
        "uncertified": dict(summary.uncertified),
        "finished_before": before,
        "from_cache": hits,
        "loaded_whole": plan.loaded_whole,
    }
    parts = [f"{count} by {path}" for path, count in paths.most_common()]
    parts += [f"{before} finished before"] * (before > 0) + [f"{hits} from the cache"] * (hits > 0)
    lines = [str(summary), f"{len(layers)} layers in {seconds:.1f} s: {', '.join(parts)}"]
    if len(summary.uncertified) > 5:
        lines.append("also not certified: " + ", ".join(name for name, _ in summary.uncertified[5:]))
    if plan.loaded_whole:
        lines.append(f"the whole model was loaded: {plan.loaded_whole}")
    if args.form == "residual":
        lines.append(f"residual base: {args.out / 'base'}   adapter: {args.out / 'adapter'}")
    else:
        lines.append(f"adapter: {args.out}")
    return record, "\n".join(lines)


def _check_folders(args: argparse.Namespace, work: WorkFolder) -> None:
    out = args.out.absolute()
    check_output_folder(args)
    if args.cache and args.cache.exists() and not args.cache.is_dir():
        raise NotADirectoryError(f"{args.cache} is not a folder; give the folder of a cache to --cache.")

    def resumes(held: set[str]) -> bool:
        if args.form == "residual":
            return work.ready or held <= {WORK, DONE}
        return work.ready or held == {SIDECAR}

    check_output(out, whole=args.form == "residual", overwrite=args.force, resumes=resumes, option="--force")


def _cache(args: argparse.Namespace) -> SpectralCache | None:
    folder = args.cache or os.environ.get("IPCA_CACHE")
    return SpectralCache(folder) if folder and not args.no_cache else None
