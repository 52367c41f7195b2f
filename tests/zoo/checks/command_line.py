"""Checks of the command line over a saved model folder."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

import ipca
from ipca.cli.main import main
from ipca.model.apply import adapted_layers
from tests.zoo.case import RANK, Case, NotApplicableError, Way, once, trainable, warned
from tests.zoo.outputs import assert_close, assert_equal, perturb, run


def call(*words: object) -> Any:
    """What a command prints as JSON.

    Raises:
        RuntimeError: it failed; its last line.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as stopped:
            code = stopped.code
    if code:
        raise RuntimeError((err.getvalue().strip().splitlines() or [f"exit {code}"])[-1])
    return json.loads(out.getvalue())


@once
def base_folder(case: Case) -> Path:
    """The base as a folder of sharded files."""
    if not isinstance(case.plain, transformers.PreTrainedModel):
        raise NotApplicableError("is no model of transformers")
    case.plain.save_pretrained(case.folder / "base", max_shard_size="60KB")
    return case.folder / "base"


def base(case: Case, folder: Path | None = None) -> Any:
    """The model of a folder, copied: in a mapped file weights lie at odd addresses, where products round otherwise."""
    model = type(case.plain).from_pretrained(folder or base_folder(case), dtype="auto")
    return copy.deepcopy(model.eval().requires_grad_(False))


def options(case: Case, way: Way) -> list[str]:
    """The layers in the words of the command line."""
    chosen = case.selected(Way(way.selection, "intact")).get("targets")
    return ["--rank", str(RANK), "--json", *(["--targets", *chosen] if chosen else [])]


@once
def init_folder(case: Case, way: Way) -> Path:
    """The adapter that ``ipca init`` writes."""
    call("init", base_folder(case), "-o", case.folder / f"init.{way.selection}", *options(case, way))
    return case.folder / f"init.{way.selection}"


def inspect(case: Case, way: Way) -> None:
    """``ipca inspect`` lists the layers that ``apply_pc`` adapts."""
    rows = call("inspect", base_folder(case), *options(case, way))["layers"]
    found = {re.sub(r"\[\d+\]$", "", row["layer"]) for row in rows}  # each expert of a stack has a row
    wanted = set(adapted_layers(case.apply(Way(way.selection, "intact"))))
    assert found == wanted, f"lists other layers: {sorted(found ^ wanted)[:3]}"


def init(case: Case, way: Way) -> None:
    """``ipca init`` writes the file of ``apply_pc`` and ``save_adapter``, to the bit."""
    folder = init_folder(case, way)
    model = ipca.apply_pc(base(case), rank=RANK, progress=False, **case.selected(Way(way.selection, "intact")))
    memory = case.folder / f"memory.{way.selection}"
    ipca.save_adapter(model, memory, base_model=str(base_folder(case)))
    found, wanted = (load_file(path / "adapter_model.safetensors") for path in (folder, memory))
    assert set(found) == set(wanted), f"other tensors: {sorted(set(found) ^ set(wanted))[:3]}"
    other = [name for name in found if not torch.equal(found[name], wanted[name])]
    assert not other, f"other values in {other[:3]}"
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in (folder, memory)]
    assert configs[0] == configs[1], "another adapter_config.json"


def merge(case: Case, way: Way) -> None:
    """What ``ipca init`` wrote loads as the base; trained and merged by ``ipca merge`` it computes the same."""
    model = ipca.load_adapter(base(case), init_folder(case, way))
    assert_equal(run(model, case.inputs), run(base(case), case.inputs))
    perturb(trainable(model))
    trained, merged = case.folder / f"trained.{way.selection}", case.folder / f"merged.{way.selection}"
    ipca.save_adapter(model, trained)
    call("merge", base_folder(case), trained, "-o", merged, "--json")
    assert_close(run(base(case, merged), case.inputs), run(model, case.inputs), case.tol)


def residual(case: Case, way: Way) -> None:
    """The residual base and the adapter of ``ipca init --form residual`` are together, in PEFT, the base."""
    folder = case.folder / f"residual.{way.selection}"
    words = ("init", base_folder(case), "-o", folder, "--form", "residual", *options(case, way))
    told = warned(lambda: call(*words))
    model = PeftModel.from_pretrained(base(case, folder / "base"), folder / "adapter").eval()
    assert_close(run(model, case.inputs), run(base(case), case.inputs), case.tol, told)
