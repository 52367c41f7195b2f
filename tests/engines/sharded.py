"""One of two processes: FSDP2, its checkpoints, its adapter files, and what is refused. Facts go to a JSON file."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import ipca
from tests.engines import launch


def sharded(model):
    for block in model[:2]:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train_and_resume(form, folder):
    """Save before training, after two steps (a checkpoint), and after four; then go on from the checkpoint again."""
    model = sharded(launch.adapted(form))
    optimizer, part = launch.optimizer(model), launch.half(rank)
    ipca.save_adapter(model, folder / "start")
    first = launch.losses(model, optimizer, range(2), part)
    state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder / "checkpoint")
    then = launch.losses(model, optimizer, range(2, 4), part)
    ipca.save_adapter(model, folder / "adapter")
    for kind in ("peft", "residual"):
        ipca.export(model, folder / kind, format=kind)

    again = launch.adapted(form)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1.0)
    sharded(again)
    optimizer = launch.optimizer(again)
    state, optimizer_state = get_state_dict(again, optimizer)
    dcp.load({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder / "checkpoint")
    set_state_dict(again, optimizer, model_state_dict=state, optim_state_dict=optimizer_state)
    return model, {"first": first, "then": then, "resumed": launch.losses(again, optimizer, range(2, 4), part)}


def outside_forward(model, made):
    """What a sharded layer and model do when nobody has put them together."""
    layer, x = model[0].up, launch.batch(9)[0]
    whole, seen = layer.effective_weight(), layer.weight.clone().full_tensor()
    with torch.no_grad():
        y = model(x)
        merged = ipca.merge_adapter(model)(x)
        ipca.unmerge_adapter(model)
    return {
        "weight_error": (seen - whole).abs().max().item(),
        "merged_error": (merged - y).abs().max().item(),
        "op": launch.raised(lambda: ipca.ops.pc_linear(x, layer.base_weight, layer.lora_A, layer.lora_B)),
        "unload": launch.raised(lambda: ipca.unload(model)),
        "load_adapter": launch.raised(lambda: ipca.load_adapter(model, made / "adapter")),
        "apply_pc": launch.raised(lambda: ipca.apply_pc(sharded(launch.base()), rank=2, progress=False)),
        "unwritable": launch.raised(lambda: ipca.save_adapter(model, made / "start/ipca.json")),
    }


def cast(model):
    """The largest change of a weight when a sharded model is cast, in units of its own rounding."""
    before = model[0].up.effective_weight()
    after = model.to(torch.bfloat16)[0].up.effective_weight()
    return ((after - before).norm() / before.norm() / torch.finfo(torch.bfloat16).eps).item()


def train_kinds(form):
    model = fully_shard(launch.kinds(form), mesh=mesh)
    launch.kinds_step(model, [launch.half(rank)])
    ipca.save_adapter(model, folder / f"{form}-kinds")


def export_one_factor():
    model = fully_shard(launch.one_factor(), mesh=mesh)
    ipca.export(model, folder / "one-factor", format="serve")


def mixed_precision():
    """The largest difference that adapting makes before training, where parameters are gathered as bfloat16."""
    policy, x, found = MixedPrecisionPolicy(param_dtype=torch.bfloat16), launch.batch(0)[0], {}
    plain = fully_shard(launch.base(), mesh=mesh, mp_policy=policy)(x)
    for form in ("intact", "residual"):
        y = fully_shard(launch.adapted(form), mesh=mesh, mp_policy=policy)(x)
        found[form] = ((y - plain).norm() / plain.norm()).item()
    return found | {"dtype": str(plain.dtype)}


def tensor_parallel():
    """A plan over an adapted layer is refused by PyTorch; a plan over the others runs."""
    model, x = nn.Sequential(nn.Linear(21, 33), nn.Linear(33, 12), nn.Linear(12, 5)), launch.batch(0)[0]
    ipca.apply_pc(model, rank=3, targets=["0"], progress=False)
    before = model(x)
    refused = launch.raised(lambda: parallelize_module(model, mesh, {"0": ColwiseParallel()}))
    parallelize_module(model, mesh, {"1": ColwiseParallel(), "2": RowwiseParallel()})
    late = launch.raised(lambda: ipca.apply_pc(model, rank=3, targets=["1"], progress=False))
    return {"plan": refused, "late": late, "rest": (model(x) - before).abs().max().item()}


folder, rank = Path(sys.argv[1]), None
dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
facts = {}
for form in ("intact", "residual"):
    model, facts[form] = train_and_resume(form, folder / f"{form}-form")
    train_kinds(form)
    facts[form] |= outside_forward(model, folder / f"{form}-form")
facts["cast"] = cast(model)
export_one_factor()
facts["mixed_precision"] = mixed_precision()
facts["tensor_parallel"] = tensor_parallel()
(folder / f"{rank}.json").write_text(json.dumps(facts))
dist.barrier()  # neither ends while the other still talks to it
dist.destroy_process_group()
