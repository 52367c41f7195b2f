"""One of two processes: DistributedDataParallel, accelerate, and FSDP1, which is refused. Facts go to a JSON file."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

import ipca
from tests.engines import launch


def ddp(form):
    model = DistributedDataParallel(launch.adapted(form))
    found = launch.losses(model, launch.optimizer(model.module), range(4), launch.half(rank))
    if rank == 0:
        ipca.save_adapter(model.module, folder / f"{form}-ddp")
    dist.barrier()
    ipca.load_adapter(model.module, folder / f"{form}-ddp")  # in place: the wrapper knows these factors
    return {"losses": found, "wrapper": launch.raised(lambda: ipca.save_adapter(model, folder / "refused"))}


def accelerated():
    """Four steps through accelerate, the adapter of what it unwraps; two more, and again from its checkpoint."""
    accelerator = Accelerator(cpu=True)
    model = launch.adapted("intact")
    model, optimizer = accelerator.prepare(model, launch.optimizer(model))
    part, kind = launch.half(rank), str(accelerator.distributed_type)
    found = launch.losses(model, optimizer, range(4), part, accelerator.backward)
    if accelerator.is_main_process:
        ipca.save_adapter(accelerator.unwrap_model(model), folder / "accelerate")
    accelerator.save_state(folder / "state")
    then = launch.losses(model, optimizer, range(4, 6), part, accelerator.backward)
    accelerator.load_state(folder / "state")
    resumed = launch.losses(model, optimizer, range(4, 6), part, accelerator.backward)
    return {"losses": found, "then": then, "resumed": resumed, "kind": kind}


def fsdp1(policy):
    """What saving says to a model of flat parameters, wrapped once or block by block."""
    model = FullyShardedDataParallel(
        launch.adapted("intact"), use_orig_params=True, auto_wrap_policy=policy, device_id=torch.device("cpu")
    )
    return launch.raised(lambda: ipca.save_adapter(model.module, folder / "refused"))


def wrapped_first():
    """What adapting says to a model that is wrapped already, to its wrapper, and to what accelerate has prepared."""
    plain = launch.base()
    wrapper = DistributedDataParallel(plain)
    found = [
        launch.raised(lambda model=model: ipca.apply_pc(model, rank=2, progress=False)) for model in (plain, wrapper)
    ]
    prepared = Accelerator(cpu=True).prepare(launch.base())
    found.append(launch.raised(lambda: ipca.apply_pc(prepared, rank=2, progress=False)))
    found.append(launch.raised(lambda: ipca.load_adapter(wrapper, folder / "intact-ddp")))
    wrapper = prepared = None  # which lets go of the models
    ipca.apply_pc(plain, rank=2, progress=False)
    return found


folder = Path(sys.argv[1])
dist.init_process_group("gloo")
rank = dist.get_rank()
facts = {form: ddp(form) for form in ("intact", "residual")}
facts["accelerate"] = accelerated()
facts["wrapped first"] = wrapped_first()
facts["fsdp1"] = [fsdp1(None), fsdp1(ModuleWrapPolicy({launch.Block}))]
(folder / f"{rank}.json").write_text(json.dumps(facts))
dist.barrier()  # neither ends while the other still talks to it
dist.destroy_process_group()
