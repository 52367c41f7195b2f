"""A small model, its training, and two processes that train it together, for the tests of training engines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn

import ipca
from ipca.peft import PCConfig

ROOT = Path(__file__).parent.parent.parent
RANK, LR = 3, 1e-2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(21, 33), nn.Linear(33, 21, bias=False), nn.LayerNorm(21)

    def forward(self, x):
        return self.norm(x + self.down(self.up(x).relu()))


def base():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(21, 5))


def adapted(form):
    """Factors in both blocks; the last layer is fully trained."""
    return ipca.apply_pc(base(), rank=RANK, form=form, targets=["up", "down"], modules_to_save=["2"], progress=False)


def one_factor():
    """Only the factors A train, and have."""
    model = ipca.apply_pc(base(), rank=RANK, train="A", targets=["up", "down"], progress=False)
    with torch.no_grad():
        for parameter in ipca.adapter_parameters(model):
            parameter.mul_(1.5)
    return model


def in_peft():
    """The same in PEFT's layers."""
    config = PCConfig(r=RANK, target_modules=["up", "down"], modules_to_save=["2"])
    return get_peft_model(base(), config)


def peft_optimizer(model):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=LR, weight_decay=0.01)


class Kinds(nn.Module):
    """An embedding, a convolution and a linear layer, all adapted."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv, self.out = nn.Embedding(37, 19), nn.Conv1d(19, 15, 3, padding=1), nn.Linear(15, 7)

    def forward(self, ids):
        return self.out(self.conv(self.embed(ids).mT).mT)


def kinds(form):
    torch.manual_seed(0)
    return ipca.apply_pc(Kinds(), rank=RANK, form=form, targets=["embed", "conv", "out"], progress=False)


def kinds_step(model, parts):
    """One step of ``model`` on the mean of its losses on ``parts`` of a batch of ids."""
    stepper, ids = optimizer(model), torch.arange(24).view(8, 3)
    for part in parts:
        (model(ids[part]).square().mean() / len(parts)).backward()
    stepper.step()


def optimizer(model):
    return torch.optim.AdamW(ipca.adapter_parameters(model), lr=LR, weight_decay=0.01)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 21, generator=generator), torch.randn(8, 5, generator=generator)


def losses(model, optimizer, steps, part=slice(None), backward=torch.Tensor.backward):
    """The loss of each of ``steps`` on its ``part`` of the batch, training."""
    found = []
    for step in steps:
        x, y = batch(step)
        loss = nn.functional.mse_loss(model(x[part]), y[part])
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def losses_of_halves(model, optimizer, steps):
    """As :func:`losses` in one process, by the arithmetic of two: each half of a batch alone, gradients averaged."""
    found = []
    for step in steps:
        halves = [nn.functional.mse_loss(model(x), y) for x, y in zip(*(t.chunk(2) for t in batch(step)), strict=True)]
        for loss in halves:
            (loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append([loss.item() for loss in halves])
    return found


def half(rank):
    return slice(4 * rank, 4 * rank + 4)


def raised(call):
    """What ``call`` raises, as ``Type: message``."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def two_processes(script, folder, *arguments):
    """What each of two processes of ``tests/engines/script`` tells in ``folder/rank.json``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).parent / script), str(folder), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in (0, 1)]
