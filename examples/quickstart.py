"""Quickstart: pretrain a small network, adapt the middle window of its weights to a second task, save, load, merge.

python examples/quickstart.py
"""

import copy
import tempfile

import torch
from torch import nn

import ipca


def fit(model, parameters, x, y, steps, lr):
    """Full-batch AdamW on the mean squared error."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


torch.manual_seed(0)
x = torch.randn(512, 32)
first, second = torch.sin(x[:, :4]), torch.cos(x[:, 4:8])  # the pretraining task and a new one

base = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 4))
print(f"pretrained: loss {fit(base, base.parameters(), x, first, 300, 3e-3):.4f}")

model = copy.deepcopy(base)
ipca.apply_pc(model, rank=4, window="middle", progress=False)
print(ipca.summary(model))
print("before training it is the base:", torch.equal(model(x), base(x)))
print(f"new task:   loss {fit(model, ipca.adapter_parameters(model), x, second, 300, 3e-3):.4f}")

with tempfile.TemporaryDirectory() as folder:
    ipca.save_adapter(model, folder)
    again = ipca.load_adapter(copy.deepcopy(base), folder)
print("loaded:", torch.equal(again(x), model(x)))

with ipca.disabled(model):
    print("disabled it is the base:", torch.equal(model(x), base(x)))

merged = ipca.unload(model)
print(f"merged:     {type(merged[0]).__name__}, max difference {(merged(x) - again(x)).abs().max().item():.1e}")
