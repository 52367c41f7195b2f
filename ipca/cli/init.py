"""``ipca init``: the adapter of a model folder before training, layer by layer, by one process or several."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import ipca
from ipca.cli.choice import chosen_config, refuse_inputs
from ipca.config import PCConfig
from ipca.io import check_target
from ipca.io.adapter_folder import read_adapter
from ipca.io.checkpoint import Checkpoint
from ipca.io.model_folder import copy_companions, load_with_missing, model_digest
from ipca.io.peft_format import WEIGHTS
from ipca.model import Target
from ipca.model.targets import find_targets
from ipca.offline.adapter_files import write_adapter
from ipca.offline.decompose import FinishedLayer, decompose_layers, install_layers
from ipca.offline.ranks import PeerEnded, Team
from ipca.offline.skeleton import CannotStream, build_skeleton, checkpoint_keys
from ipca.offline.source import CheckpointSource, ModelSource
from ipca.offline.work_folder import DONE, WORK, Job
from ipca.svd.cache import SpectralCache

Record = dict[str, object]


@dataclass(frozen=True)
class Plan:
    """What to decompose and where the weights are; ``whole`` says why the model is in memory, None if it is not."""

    source: CheckpointSource | ModelSource
    targets: list[Target]
    whole: str | None


def init(args: argparse.Namespace) -> tuple[Record | None, str]:
    """Write the adapter of a model folder before training.

    Under torchrun the processes share the layers, and the first alone returns a record.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but this torch sees no GPU; leave it out.")
    team, job = Team.from_environment(args.device), Job(args.out)
    try:
        record, text = _run(args, team, job)
    except BaseException as error:
        if isinstance(error, PeerEnded) and not team.first:  # the first process reports it
            raise SystemExit(1) from None
        kept = job.abandon() if team.first else job.count()
        if kept:
            print(f"ipca: {kept} finished layers are kept in {job.folder}; the same command goes on", file=sys.stderr)
        if not team.first and isinstance(error, (ValueError, TypeError, RuntimeError, OSError)):
            raise RuntimeError(f"process {team.rank}: {error}") from error
        raise
    team.close()
    return (record, text) if team.first else (None, "")


def _run(args: argparse.Namespace, team: Team, job: Job) -> tuple[Record, str]:
    began = time.perf_counter()
    if not team.first:
        team.meet()  # what the first process refuses, the others need not refuse again
    config = chosen_config(args)
    if team.first:
        _check_folders(args, job)
    plan = _plan(args.model, config)
    if team.first:
        job.open({"format": 1, "ipca": ipca.__version__, "model": model_digest(args.model), **asdict(config)})
        team.meet()
    ready, cache = team.agree(job.ready), _cache(args)
    layers, before = decompose_layers(
        plan.source, plan.targets, config, job, team, device=args.device, cache=cache, progress=not args.quiet
    )
    install_layers(plan.source.model, layers, job)
    if not ready:
        _assemble(args, plan, layers, job, team)
    team.meet()
    if team.first:
        job.finish()
    team.meet()
    hits = team.total(cache.hits if cache else 0)
    return _account(args, plan, layers, before, hits, time.perf_counter() - began)


def _plan(folder: Path, config: PCConfig) -> Plan:
    """Read the model's skeleton, or the whole model where a skeleton is not enough."""
    try:
        checkpoint = Checkpoint.open(folder)
        if checkpoint is None:
            raise CannotStream("the folder holds no safetensors")
        model = build_skeleton(folder, checkpoint)
        targets = find_targets(model, config, values=False)
        keys = checkpoint_keys(model, targets, checkpoint, residual=config.form == "residual")
        return Plan(CheckpointSource(model, checkpoint, keys), targets, None)
    except CannotStream as error:
        why = str(error)
    model, missing = load_with_missing(folder)
    targets = find_targets(model, config)
    absent = [target.name for target in targets if f"{target.name}.weight" in missing]
    if absent:
        names = ", ".join(absent[:3])
        raise ValueError(f"{folder} holds no weight for {names}, and transformers would draw it; exclude it.")
    return Plan(ModelSource(model), targets, why)


def _assemble(args: argparse.Namespace, plan: Plan, layers: list[FinishedLayer], job: Job, team: Team) -> None:
    """Complete the files in the job's folder."""
    if args.form == "residual":
        plan.source.write_residual(layers, job, team, str(args.out.absolute() / "base"))
        if team.first:
            with job.writing():
                copy_companions(args.model, job.final / "base")
    elif team.first:
        write_adapter(plan.source.model, layers, job, job.final, base_model=str(args.model))


def _account(
    args: argparse.Namespace,
    plan: Plan,
    layers: list[FinishedLayer],
    before: int,
    hits: int,
    seconds: float,
) -> tuple[Record, str]:
    """The record and the text of what was done."""
    summary = ipca.summary(plan.source.model)
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
        "loaded_whole": plan.whole,
    }
    parts = [f"{count} by {path}" for path, count in paths.most_common()]
    parts += [f"{before} finished before"] * (before > 0) + [f"{hits} from the cache"] * (hits > 0)
    lines = [str(summary), f"{len(layers)} layers in {seconds:.1f} s: {', '.join(parts)}"]
    if len(summary.uncertified) > 5:
        lines.append("not certified either: " + ", ".join(name for name, _ in summary.uncertified[5:]))
    if plan.whole:
        lines.append(f"the whole model was loaded: {plan.whole}")
    if args.form == "residual":
        lines.append(f"residual base: {args.out / 'base'}   adapter: {args.out / 'adapter'}")
    else:
        lines.append(f"adapter: {args.out}")
    return record, "\n".join(lines)


def _check_folders(args: argparse.Namespace, job: Job) -> None:
    out = args.out.absolute()
    refuse_inputs(args)
    check_target(out)
    if not job.ready:
        _refuse_trained(out)
    if args.form == "residual" and not job.ready and out.is_dir() and {p.name for p in out.iterdir()} - {WORK, DONE}:
        raise FileExistsError(f"{out} is not empty; choose a new folder.")


def _refuse_trained(out: Path) -> None:
    """Raise where ``out`` holds an adapter other than an untrained start, which a new start may replace."""
    if not (out / WEIGHTS).is_file():
        return
    try:
        factors = list(read_adapter(out, whole=False).factors.values())
    except (ValueError, FileNotFoundError):  # damaged, or somebody else's
        factors = []
    if not factors or any(not (torch.equal(f.A, f.A0) and torch.equal(f.B, f.B0)) for f in factors):
        raise FileExistsError(f"{out} holds an adapter that is no untrained start; choose another folder.")


def _cache(args: argparse.Namespace) -> SpectralCache | None:
    folder = args.cache or os.environ.get("IPCA_CACHE")
    return SpectralCache(folder) if folder and not args.no_cache else None
