"""Training steps of small models on a CPU: ``ipca`` and a ``PCConfig`` beside stock PEFT's LoRA.

    python -m bench.small_models --out bench/results

The fewer tokens a step has, the more do Python, autograd and the dispatcher decide. T5 also reads ``wo.weight.dtype``
in every forward, which must not compute a weight. The models take their steps in turn, in an order that changes; a
ratio is the median over rounds of two times of the same round.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import ipca
from bench.rows import FACTS, RESULTS, append_rows, facts
from bench.timing import Timing
from ipca.nn import LinearPC
from ipca.peft import PCConfig

COLUMNS = (
    *("model", "provider", "form", "step_ms", "ratio", "ratio_low", "ratio_high", "read_dtype_us"),
    *("rounds", "layers", "batch", "length", "rank", "dtype", *FACTS),
)
RANK, VOCABULARY = 16, 1000
WARM_UP = 3
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """A model with random weights in float32 and without dropout, and its batch of random tokens."""

    name: str
    build: Callable[[], nn.Module]
    targets: list[str]
    batch: int
    length: int
    classes: bool = False

    def plain(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build()

    def inputs(self) -> dict[str, Tensor]:
        ids, labels = (torch.randint(VOCABULARY, (self.batch, self.length)) for _ in range(2))
        return {"input_ids": ids, "labels": labels[:, 0] % 2 if self.classes else labels}


def _t5() -> nn.Module:
    sizes: Any = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 8}
    sizes |= {"decoder_start_token_id": 0, "dropout_rate": 0.0}
    config: Any = T5Config(vocab_size=VOCABULARY, **sizes)
    return T5ForConditionalGeneration(config)


def _minilm() -> nn.Module:
    sizes: Any = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
    dropout: Any = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config: Any = BertConfig(vocab_size=VOCABULARY, **sizes, **dropout)
    return BertForSequenceClassification(config)


def _llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> nn.Module:
    config: Any = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


CASES = (
    Case("T5, t5-small's width, 2 + 2 layers", _t5, ["q", "v", "wi", "wo"], 1, 64),
    Case("BERT, MiniLM's shape, 6 layers", _minilm, ["query", "key", "value", "dense"], 16, 64, classes=True),
    Case("LLaMA, width 256, 4 layers", lambda: _llama(256, 704, 4, 8, 4), PROJECTIONS, 2, 256),
    Case("LLaMA, TinyLlama's shape, 1 layer", lambda: _llama(2048, 5632, 1, 32, 4), PROJECTIONS, 1, 256),
)


def adapted(case: Case) -> dict[tuple[str, str], nn.Module]:
    """Stock LoRA first: the others are compared with it."""
    common: Any = {"r": RANK, "lora_alpha": RANK, "target_modules": case.targets}
    models: dict[tuple[str, str], nn.Module] = {("peft-lora", ""): get_peft_model(case.plain(), LoraConfig(**common))}
    for form in ("residual", "intact"):
        models["ipca", form] = ipca.apply_pc(case.plain(), rank=RANK, targets=case.targets, form=form, progress=False)
    models["PCConfig", "intact"] = get_peft_model(case.plain(), PCConfig(**common))
    return models


def step_times(models: dict[tuple[str, str], nn.Module], inputs: dict[str, Tensor], rounds: int) -> dict[Any, Timing]:
    """Milliseconds of forward, backward and AdamW step of each model, round by round."""
    trained = {key: [p for p in model.parameters() if p.requires_grad] for key, model in models.items()}
    optimizers = {key: torch.optim.AdamW(parameters, lr=1e-4) for key, parameters in trained.items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in models}
    keys = [*models]
    for turn in tqdm(range(WARM_UP + rounds), desc="Steps", unit="round", file=sys.stderr):
        for key in keys[turn % len(keys) :] + keys[: turn % len(keys)]:
            start = time.perf_counter()
            optimizers[key].zero_grad()
            models[key].train()(**inputs).loss.backward()
            optimizers[key].step()
            times[key].append((time.perf_counter() - start) * 1e3)
    return {key: Timing(tuple(values[WARM_UP:])) for key, values in times.items()}


def read_dtype_us(model: nn.Module, reads: int = 20_000) -> float:
    """Microseconds of ``layer.weight.dtype``, the best of five loops."""
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))

    def loop() -> float:
        start = time.perf_counter()
        for _ in range(reads):
            _ = layer.weight.dtype
        return (time.perf_counter() - start) / reads * 1e6

    return min(loop() for _ in range(5))


def rows_of(case: Case, rounds: int) -> list[dict[str, Any]]:
    """A row for every adapted model."""
    models = adapted(case)
    timings = step_times(models, case.inputs(), rounds)
    base, rows = timings["peft-lora", ""], []
    for (provider, form), timing in timings.items():
        ratios = Timing(tuple(a / b for a, b in zip(timing.rounds, base.rounds, strict=True)))
        rows.append(
            {
                "model": case.name,
                "provider": provider,
                "form": form,
                "step_ms": f"{timing.quantile(0.5):.2f}",
                "ratio": f"{ratios.quantile(0.5):.3f}",
                "ratio_low": f"{ratios.quantile(0.25):.3f}",
                "ratio_high": f"{ratios.quantile(0.75):.3f}",
                "read_dtype_us": f"{read_dtype_us(models[provider, form]):.2f}",
                "rounds": rounds,
                "layers": sum(isinstance(module, LinearPC) for module in models["ipca", "intact"].modules()),
                "batch": case.batch,
                "length": case.length,
                "rank": RANK,
                "dtype": "float32",
                **facts(torch.device("cpu")),
            }
        )
        print(f"{case.name}, {provider} {form}: {rows[-1]['step_ms']} ms, {rows[-1]['ratio']} of stock LoRA")
    return rows


def main() -> None:
    """Measure and write ``small_models_cpu.csv`` anew, with one thread and with two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    file = arguments.out / "small_models_cpu.csv"
    file.unlink(missing_ok=True)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for case in CASES:
            append_rows(file, rows_of(case, arguments.rounds), COLUMNS)


if __name__ == "__main__":
    main()
