"""Small models whose layers are no linear layers, with an input and the layers to adapt, for several test files."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn

SIZES = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
HEADS = {"num_key_value_heads": 2, "vocab_size": 40, "tie_word_embeddings": False}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


class Convs1d(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.point = nn.Conv1d(5, 7, 3, stride=2, padding=1), nn.Conv1d(7, 6, 1, bias=False)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.point(self.wide(x).tanh()).mean(-1))


class Convs2d(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.point = nn.Conv2d(3, 7, (3, 2), stride=2, padding=(1, 0)), nn.Conv2d(5, 6, 1)
        self.same = nn.Conv2d(7, 5, 3, padding="same")

    def forward(self, x):
        return self.point(self.same(self.wide(x).tanh()).tanh())


class Convs3d(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Conv3d(3, 7, (2, 3, 2))

    def forward(self, x):
        return self.wide(x)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(19, 8, padding_idx=2), nn.Linear(8, 5)

    def forward(self, ids):
        return self.head(self.table(ids))


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, **HEADS, **EXPERTS))


def gpt_oss() -> nn.Module:
    """Its stacks are ``(E, in, out)``."""
    types = ["full_attention"] * SIZES["num_hidden_layers"]
    model = transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**SIZES, **HEADS, **EXPERTS, head_dim=8, layer_types=types)
    )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.gate_up_proj.normal_(std=0.1)
            layer.mlp.experts.down_proj.normal_(std=0.1)
    return model


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    targets: list[str]
    options: dict[str, object]
    count: int


def ids() -> Tensor:
    return torch.randint(0, 19, (3, 7))


STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "conv1d": Case(Convs1d, lambda: torch.randn(4, 5, 13), ["wide", "point"], {"rank_pattern": {"point": 2}}, 2),
    "conv2d": Case(
        Convs2d,
        lambda: torch.randn(2, 3, 9, 11),
        ["wide", "same", "point"],
        {"window_pattern": {"wide": "minor"}, "alpha_pattern": {"same": 7.5}},
        3,
    ),
    "conv3d": Case(Convs3d, lambda: torch.randn(2, 3, 5, 6, 7), ["wide"], {}, 1),
    "embedding": Case(Table, ids, ["table", "head"], {"alpha_pattern": {"table": 4.5}}, 2),
    "experts": Case(mixtral, ids, [*STACKS, "q_proj"], {"rank_pattern": {r".*\.1\.mlp\.experts\.down_proj": 2}}, 6),
    "one stack": Case(mixtral, ids, ["experts.down_proj", "embed_tokens"], {"alpha": 4.5}, 3),
    "experts transposed": Case(gpt_oss, ids, STACKS, {"window": "principal"}, 4),
}


def output(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y if isinstance(y, Tensor) else y.logits


def relative(x: Tensor, y: Tensor) -> float:
    return ((x.double() - y.double()).norm() / y.double().norm()).item()
