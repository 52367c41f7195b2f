"""One of two processes: a PeftModel with a PCConfig under FSDP2 and DDP. Facts go to a JSON file."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ipca.peft import save_gathered
from tests.engines import launch


def sharded(model):
    for block in model.base_model.model[:2]:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def resumed(part):
    """The losses of a model that held other values before it loaded the checkpoint."""
    model = launch.in_peft()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    sharded(model)
    optimizer = launch.peft_optimizer(model)
    state, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder / "checkpoint")
    set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=optimizer_state)
    return launch.losses(model, optimizer, range(2, 4), part)


folder = Path(sys.argv[1])
dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
part = launch.half(rank)

model = sharded(launch.in_peft())
optimizer = launch.peft_optimizer(model)
facts = {"first": launch.losses(model, optimizer, range(2), part)}
state, optimizer_state = get_state_dict(model, optimizer)
dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder / "checkpoint")
facts["then"] = launch.losses(model, optimizer, range(2, 4), part)
facts["resumed"] = resumed(part)
save_gathered(model, folder / "fsdp2")

model = launch.in_peft()
replicated = DistributedDataParallel(model)
facts["ddp"] = launch.losses(replicated, launch.peft_optimizer(model), range(4), part)
save_gathered(model, folder / "ddp")
facts["wrapper"] = launch.raised(lambda: save_gathered(replicated, folder / "wrapper"))
(folder / f"{rank}.json").write_text(json.dumps(facts))
dist.barrier()  # neither ends while the other still talks to it
dist.destroy_process_group()
