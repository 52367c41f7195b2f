"""Small models to adapt with PEFT, built without ipca, so that a process that cannot import it unpickles them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from tests.helpers.layer_kinds import Convs1d, Convs2d, Convs3d, Table, mixtral

HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 37}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.a, self.b = nn.Embedding(30, 20), nn.Linear(20, 12), nn.Linear(12, 20)

    def forward(self, ids):
        return self.b(self.a(self.words(ids)).relu())


class Heavy(nn.Module):
    """Large enough to be quantized, with a head that stays as it is."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 5)

    def forward(self, x):
        return self.head(self.b(self.a(x).relu()))


def llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**HEADS, **sizes))


def gpt2() -> nn.Module:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=37, **sizes))


def vit() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 24, "image_size": 16, "patch_size": 8, "num_labels": 3}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**HEADS, **sizes))


class Matrix(nn.Module):
    """A matrix that is a parameter of its own, and one beside a layer."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.other = nn.Parameter(torch.randn(9, 13)), nn.Parameter(torch.randn(7, 9))

        def forward(self, x):
            return (x @ self.weight.T).relu() @ self.other.T

    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Linear(5, 13), Matrix.Inner()

    def forward(self, x):
        return self.inner(self.first(x))


def ids() -> Tensor:
    return torch.randint(0, 30, (3, 7))


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    options: dict[str, Any]


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "llama": Case(llama, ids, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "gpt2": Case(gpt2, ids, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "vit": Case(vit, lambda: torch.randn(2, 3, 16, 16), {"target_modules": ["query", "projection"]}),
    "embedding": Case(Table, lambda: torch.randint(0, 19, (3, 7)), {"target_modules": ["table", "head"]}),
    "conv1d": Case(Convs1d, lambda: torch.randn(4, 5, 13), {"target_modules": ["wide", "point", "head"]}),
    "conv2d": Case(Convs2d, lambda: torch.randn(2, 3, 9, 11), {"target_modules": ["wide", "same", "point"]}),
    "conv3d": Case(Convs3d, lambda: torch.randn(2, 3, 5, 6, 7), {"target_modules": ["wide"]}),
    "matrix": Case(
        Matrix,
        lambda: torch.randn(3, 5),
        {"target_modules": ["first"], "target_parameters": ["inner.weight", "inner.other"]},
    ),
    "experts": Case(mixtral, ids, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
}
