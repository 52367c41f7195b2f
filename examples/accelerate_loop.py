"""accelerate: a plain training loop, checkpointed and resumed.

accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py --out adapter
"""

import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tiny import options, tiny_data, tiny_model
from torch.utils.data import DataLoader

import ipca


def train(accelerator, model, optimizer, batches):
    """Train on ``batches`` and return the mean loss over all processes for each step."""
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return losses


def main(steps, out):
    """Train, save the state and the adapter, and resume from the state."""
    accelerator = Accelerator()
    model = ipca.apply_pc(tiny_model(), rank=8, window="middle", progress=False)
    optimizer = torch.optim.AdamW(ipca.adapter_parameters(model), lr=2e-3, weight_decay=0.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(tiny_data(), batch_size=4))
    batches = [batch for batch, _ in zip(loader, range(2 * steps), strict=False)]

    first = train(accelerator, model, optimizer, batches[:steps])
    folder = broadcast_object_list([tempfile.mkdtemp()])[0]
    accelerator.save_state(folder)
    then = train(accelerator, model, optimizer, batches[steps:])
    if accelerator.is_main_process:
        ipca.save_adapter(accelerator.unwrap_model(model), out)  # one process; for a model sharded by FSDP2 all

    accelerator.load_state(folder)
    resumed = train(accelerator, model, optimizer, batches[steps:])
    accelerator.print(f"loss: {first[0]:.3f} -> {then[-1]:.3f}")
    accelerator.print("resumed with the same losses:", resumed == then)
    accelerator.end_training()


if __name__ == "__main__":
    main(**options(__doc__))
