"""Small models to adapt with PEFT, what trains them, and how far two outputs are apart."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from layer_kinds import Convs1d, Convs2d, Convs3d, mixtral
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ipca.interop.peft import PCConfig

HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 37}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.a, self.b = nn.Embedding(30, 20), nn.Linear(20, 12), nn.Linear(12, 20)

    def forward(self, ids):
        return self.b(self.a(self.words(ids)).relu())


def llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**HEADS, **sizes))


def gpt2() -> nn.Module:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=37, **sizes))


def vit() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 24, "image_size": 16, "patch_size": 8, "num_labels": 3}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**HEADS, **sizes))


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
    "embedding": Case(Small, ids, {"target_modules": ["words", "a"]}),
    "conv1d": Case(Convs1d, lambda: torch.randn(4, 5, 13), {"target_modules": ["wide", "point", "head"]}),
    "conv2d": Case(Convs2d, lambda: torch.randn(2, 3, 9, 11), {"target_modules": ["wide", "same", "point"]}),
    "conv3d": Case(Convs3d, lambda: torch.randn(2, 3, 5, 6, 7), {"target_modules": ["wide"]}),
    "experts": Case(mixtral, ids, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
}


def output(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y if isinstance(y, Tensor) else y.logits


def wrap(base: nn.Module, config: LoraConfig | None = None, **options: Any) -> nn.Module:
    """``base``, untouched, in PEFT: a PCConfig of rank 3 unless ``config`` is given."""
    return get_peft_model(copy.deepcopy(base), config or PCConfig(**{"r": 3, "target_modules": ["a", "b"], **options}))


def train(model: nn.Module, x: Tensor, steps: int = 2, optimizer: torch.optim.Optimizer | None = None) -> list[float]:
    """The losses of some steps of AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = output(model, x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def off(x: Tensor, y: Tensor) -> float:
    """The largest difference relative to the largest entry of ``y``."""
    return ((x.double() - y.double()).abs().max() / y.double().abs().max()).item()
