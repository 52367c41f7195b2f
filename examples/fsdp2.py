"""FSDP2: shard an adapted model over two processes, train, checkpoint, resume, and write one adapter file.

torchrun --nproc-per-node 2 examples/fsdp2.py --out adapter
"""

import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny import options, tiny_data, tiny_model
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

import ipca


def build():
    """Adapt first, then shard block by block; create the optimizer over the sharded parameters."""
    model = ipca.apply_pc(tiny_model(), rank=8, window="middle", progress=False)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    return model, torch.optim.AdamW(ipca.adapter_parameters(model), lr=2e-3, weight_decay=0.0)


def train(model, optimizer, batches):
    """Train on ``batches`` and return the mean loss over all processes for each step."""
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach().clone()
        dist.all_reduce(loss)
        losses.append(loss.item() / dist.get_world_size())
    return losses


def checkpoint(model, optimizer, folder, action):
    """Save or load a sharded training state; it can be loaded with another number of processes."""
    state, optimizer_state = get_state_dict(model, optimizer)
    action({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=optimizer_state)


def main(steps, out):
    """Train, save the state and the adapter, and resume from the state in a new model."""
    dist.init_process_group("gloo")  # on GPUs "nccl", after torch.cuda.set_device(local_rank)
    shared = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)

    data = tiny_data()
    batches = list(DataLoader(data, batch_size=4, sampler=DistributedSampler(data, shuffle=False)))[: 2 * steps]
    model, optimizer = build()
    first = train(model, optimizer, batches[:steps])
    checkpoint(model, optimizer, shared[0], dcp.save)
    then = train(model, optimizer, batches[steps:])

    again, new_optimizer = build()
    checkpoint(again, new_optimizer, shared[0], dcp.load)
    resumed = train(again, new_optimizer, batches[steps:])

    ipca.save_adapter(model, out)  # every process calls it, rank 0 writes
    if dist.get_rank() == 0:
        print(f"loss: {first[0]:.3f} -> {then[-1]:.3f}")
        print("resumed with the same losses:", resumed == then)
        x = torch.stack([row["input_ids"] for row in data[:2]])
        loaded = ipca.load_adapter(tiny_model(), out)
        print("the adapter on one process: loss", f"{loaded(x, labels=x).loss.item():.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(**options(__doc__))
