"""A study on a random model of two layers with random texts: whole runs in a second.

As a script it is a runner: ``python tests/helpers/frontier_study.py FOLDER``.
"""

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from studies.frontier.design import Wave
from studies.frontier.rows import Rows
from studies.frontier.run import Runners, collect
from studies.frontier.texts import Texts
from studies.frontier.training import Study
from studies.language.protocol import PLAN

VOCABULARY, LENGTH = 61, 12
TWO = ("middle", "lora")
DESIGN = replace(
    PLAN,
    waves=(Wave(8, TWO, (0, 1), True), Wave(8, TWO, (0, 1), False)),
    targets={("german", 8): (4.835, 4.8, 4.78), ("cpp", 8): (4.835, 4.8, 4.78)},
    rank=4,
)


@cache
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            use_cache=False,
            initializer_range=0.2,
        )
    ).eval()


def texts():
    draw = torch.Generator().manual_seed(1)

    def some(count, low, high):
        return torch.randint(low, high, (count, LENGTH), generator=draw)

    tasks = {name: (some(40, *half), some(8, *half)) for name, half in (("german", (0, 30)), ("cpp", (30, 61)))}
    samples, prose = some(8, 0, 61), some(4, 0, 61)
    other = {"german": "cpp", "cpp": "german"}
    return {
        name: Texts(train, new, {"prose": prose, "samples": samples, "other": tasks[other[name]][1][:4]})
        for name, (train, new) in tasks.items()
    }


def study(work, design=DESIGN, **hashes):
    return Study(design, model(), texts(), Path(work), {"protocol": "p", "model": "m", **hashes}, progress=False)


def main(folder, limit=None):
    torch.set_num_threads(1)
    folder = Path(folder)
    found = study(folder / "work")
    collect(found, Rows(folder / "rows"), Runners(folder / "work"), limit)


if __name__ == "__main__":
    main(sys.argv[1])
