"""Processes that write a pickle of an adapted model of a class of their own, or only unpickle models and save them.

Usage, in the root of the repository: python -m tests.helpers.pickled_models write|read FOLDER.
"""

import copy
import sys
from pathlib import Path

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

torch.set_num_threads(1)


class Net(nn.Module, PyTorchModelHubMixin):
    """A class of ``__main__``, as one that a notebook defines."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.body, self.out = nn.Linear(8, width), nn.Linear(width, 5)

    def forward(self, x):
        return self.out(self.body(x).relu())


def write(folder):
    import ipca

    torch.manual_seed(0)
    model, x = ipca.apply_pc(Net(), rank=3, progress=False), torch.randn(4, 8)
    with torch.no_grad():
        model.body.lora_B.add_(0.1)
        y = model(x)
    torch.save(model, folder / "net.pt")
    torch.save((x, y), folder / "net_output.pt")


def read(folder):
    """Save every model in ``folder``, and a copy of it, with what its class has for that."""
    for file in sorted(folder.glob("*.pt")):
        model = torch.load(file, weights_only=False)
        if isinstance(model, nn.Module):
            model.save_pretrained(folder / file.stem)
            copy.deepcopy(model).save_pretrained(folder / f"{file.stem} copied")
    if (folder / "net.pt").exists():
        (x, y), loaded = torch.load(folder / "net_output.pt"), Net.from_pretrained(folder / "net", strict=True)
        assert (loaded(x) - y).abs().max() < 1e-5


if __name__ == "__main__":
    assert "ipca" not in sys.modules
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
