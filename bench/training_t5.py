"""Training steps of a small T5 with few tokens: the host's time per layer, ``ipca`` beside stock PEFT's LoRA.

With 64 tokens a layer's products are so short that Python, autograd and the dispatcher decide. T5 also reads
``wo.weight.dtype`` in every forward, which must not compute a weight. The models take their steps in turn, in an order
that changes; a ratio is the median over rounds of two times of the same round.
python -m bench.training_t5 --out bench/results
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import T5Config, T5ForConditionalGeneration

import ipca
from bench.rows import FACTS, RESULTS, append_rows, facts
from bench.timing import Timing
from ipca.nn import LinearPC

COLUMNS = (
    *("provider", "form", "step_ms", "ratio", "ratio_low", "ratio_high", "read_dtype_us"),
    *("rounds", "layers", "tokens", "rank", "dtype", *FACTS),
)
TARGETS = ["q", "v", "wi", "wo"]
RANK, TOKENS, VOCABULARY = 16, 64, 1000
WARM_UP = 3


def plain_model() -> nn.Module:
    """A T5 of t5-small's width, two blocks each in encoder and decoder, random weights, float32, no dropout."""
    torch.manual_seed(0)
    config = T5Config(  # type: ignore[call-arg]
        vocab_size=VOCABULARY,
        d_model=512,
        d_kv=64,
        d_ff=2048,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=8,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    return T5ForConditionalGeneration(config)


def adapted() -> dict[tuple[str, str], nn.Module]:
    """Stock LoRA first: the others are compared with it."""
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS)
    models: dict[tuple[str, str], nn.Module] = {("peft-lora", ""): get_peft_model(plain_model(), lora)}
    for form in ("intact", "residual"):
        models["ipca", form] = ipca.apply_pc(plain_model(), rank=RANK, targets=TARGETS, form=form, progress=False)
    return models


def step_times(models: dict[tuple[str, str], nn.Module], rounds: int) -> dict[tuple[str, str], Timing]:
    """Milliseconds of forward, backward and AdamW step of each model, round by round."""
    ids, labels = (torch.randint(VOCABULARY, (1, TOKENS)) for _ in range(2))
    trained = {key: [p for p in model.parameters() if p.requires_grad] for key, model in models.items()}
    optimizers = {key: torch.optim.AdamW(parameters, lr=1e-4) for key, parameters in trained.items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in models}
    keys = [*models]
    for turn in tqdm(range(WARM_UP + rounds), desc="steps", unit="round", file=sys.stderr):
        for key in keys[turn % len(keys) :] + keys[: turn % len(keys)]:
            start = time.perf_counter()
            optimizers[key].zero_grad()
            models[key].train()(input_ids=ids, labels=labels).loss.backward()
            optimizers[key].step()
            times[key].append((time.perf_counter() - start) * 1e3)
    return {key: Timing(tuple(values[WARM_UP:])) for key, values in times.items()}


def read_dtype_us(model: nn.Module, reads: int = 20_000) -> float:
    """Microseconds of ``layer.weight.dtype``, the best of five loops."""
    layer = next(module for name, module in model.named_modules() if name.endswith(".wo"))

    def loop() -> float:
        start = time.perf_counter()
        for _ in range(reads):
            _ = layer.weight.dtype
        return (time.perf_counter() - start) / reads * 1e6

    return min(loop() for _ in range(5))


def main() -> None:
    """Measure and write ``t5_training_cpu.csv`` anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    models = adapted()
    timings = step_times(models, arguments.rounds)
    base = timings["peft-lora", ""]
    rows = []
    for (provider, form), timing in timings.items():
        ratios = Timing(tuple(a / b for a, b in zip(timing.rounds, base.rounds, strict=True)))
        rows.append(
            {
                "provider": provider,
                "form": form,
                "step_ms": f"{timing.quantile(0.5):.2f}",
                "ratio": f"{ratios.quantile(0.5):.3f}",
                "ratio_low": f"{ratios.quantile(0.25):.3f}",
                "ratio_high": f"{ratios.quantile(0.75):.3f}",
                "read_dtype_us": f"{read_dtype_us(models[provider, form]):.2f}",
                "rounds": arguments.rounds,
                "layers": sum(isinstance(module, LinearPC) for module in models["ipca", "intact"].modules()),
                "tokens": TOKENS,
                "rank": RANK,
                "dtype": "float32",
                **facts(torch.device("cpu")),
            }
        )
        print(f"{provider} {form}: {rows[-1]['step_ms']} ms, {rows[-1]['ratio']} of stock LoRA")
    file = arguments.out / "t5_training_cpu.csv"
    file.unlink(missing_ok=True)
    append_rows(file, rows, COLUMNS)


if __name__ == "__main__":
    main()
