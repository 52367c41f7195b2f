"""Seconds until a model has its adapter: ``PCConfig`` and ``ipca.apply_pc`` beside PEFT's starts from an SVD.

    python -m bench.start --out bench/results

Random weights, Gaussian with 32 components above the noise, in float32. PEFT's ``"pissa"`` makes the full SVD of every
weight; ``"pissa_niter_16"`` is a randomized one, of the principal window only and without a proof. All arms take their
turn in every round, then ours once more beside another process whose two threads multiply without a pause; PEFT's take
minutes there. A ratio is the median over rounds of two times of the same round.
"""

from __future__ import annotations

import argparse
import copy
import gc
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import ipca
from bench.rows import FACTS, RESULTS, append_rows, facts
from bench.small_models import PROJECTIONS, RANK, VOCABULARY
from bench.svd_matrices import OUTLIERS
from bench.timing import Timing
from ipca.peft import PCConfig

COLUMNS = (
    *("model", "provider", "window", "beside", "seconds", "seconds_low", "seconds_high"),
    *("ratio", "ratio_low", "ratio_high", "over_quiet", "rounds", "layers", "rank", "dtype", *FACTS),
)
NOISE = 0.02
WINDOWS = ("principal", "middle", "minor")
QUIET, BUSY = "nothing", "two busy threads"
SPIN = """
import os, torch
torch.set_num_threads(2)
a, parent = torch.randn(512, 512), os.getppid()
while os.getppid() == parent:
    a @ a
"""
Arm = tuple[str, str]
"""Provider and window."""
YARDSTICK: Arm = ("peft pissa", "principal")


@dataclass(frozen=True)
class Case:
    """A model, the layers to adapt, and in how many rounds."""

    name: str
    build: Callable[[], nn.Module]
    targets: list[str]
    rounds: int

    def plain(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.build().eval()
        with torch.no_grad():
            for layer in self.layers(model):
                fill_(layer.weight)
        return model

    def layers(self, model: nn.Module) -> list[nn.Linear]:
        ends = tuple(self.targets)
        return [layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name.endswith(ends)]


def fill_(weight: Tensor) -> None:
    """Noise, and components above it of up to ten times its largest singular value, which decay to that."""
    m, n = weight.shape
    largest = NOISE * (m**0.5 + n**0.5)
    scale = largest * torch.logspace(1, 0, OUTLIERS)
    left, right = (torch.linalg.qr(torch.randn(size, OUTLIERS))[0] for size in (m, n))
    weight.normal_(std=NOISE).addmm_(left * scale, right.mT)


def _bert(hidden: int, layers: int, heads: int) -> nn.Module:
    sizes: Any = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": heads}
    config: Any = BertConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **sizes)
    return BertForSequenceClassification(config)


def _llama() -> nn.Module:
    sizes: Any = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=2, **sizes))


BERT = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
CASES = (
    Case("MiniLM's shape, 6 layers of 384", lambda: _bert(384, 6, 12), BERT, 7),
    Case("BERT-base's shape, 4 layers of 768", lambda: _bert(768, 4, 12), BERT, 5),
    Case("TinyLlama's shape, 2 layers of 2048", _llama, PROJECTIONS, 3),
)


def arms(case: Case) -> dict[Arm, Callable[[nn.Module], nn.Module]]:
    """What turns a plain model into an adapted one."""
    common: Any = {"r": RANK, "lora_alpha": RANK, "target_modules": case.targets}

    def peft(initialization: str) -> Callable[[nn.Module], nn.Module]:
        return lambda model: get_peft_model(model, LoraConfig(init_lora_weights=initialization, **common))  # type: ignore[arg-type]

    def config(window: str) -> Callable[[nn.Module], nn.Module]:
        return lambda model: get_peft_model(model, PCConfig(window=window, progress=False, **common))

    def apply(window: str) -> Callable[[nn.Module], nn.Module]:
        return lambda model: ipca.apply_pc(
            model, rank=RANK, window=window, targets=case.targets, modules_to_save=None, progress=False
        )

    found = {YARDSTICK: peft("pissa"), ("peft pissa_niter_16", "principal"): peft("pissa_niter_16")}
    for window in WINDOWS:
        found |= {("PCConfig", window): config(window), ("apply_pc", window): apply(window)}
    return found


@contextmanager
def other_process() -> Iterator[Callable[[bool], None]]:
    """A process with two busy threads that the function given lets run or stops; it is stopped at first."""
    process = subprocess.Popen([sys.executable, "-c", SPIN])

    def run(go: bool) -> None:
        process.send_signal(signal.SIGCONT if go else signal.SIGSTOP)
        time.sleep(0.1)

    try:
        time.sleep(5)  # until it has imported torch
        run(False)
        yield run
    finally:
        process.kill()
        process.wait()


def times(case: Case) -> dict[str, dict[Arm, Timing]]:
    """Milliseconds of each arm, round by round, beside nothing and beside a busy process.

    In the first round the model has to compute what it computed before: ours to the bit.
    """
    plain, ids = case.plain(), torch.randint(VOCABULARY, (1, 16))
    with torch.no_grad():
        expected = plain(ids).logits
    starts = arms(case)
    found: dict[str, dict[Arm, list[float]]] = {beside: {arm: [] for arm in starts} for beside in (QUIET, BUSY)}
    order = [*starts]
    with other_process() as let_run, tqdm(total=case.rounds * 2 * len(order), desc=case.name, file=sys.stderr) as bar:
        for turn in range(case.rounds):
            for beside in (QUIET, BUSY):
                let_run(beside == BUSY)
                for arm in order[turn % len(order) :] + order[: turn % len(order)]:
                    bar.update()
                    if beside == BUSY and arm[0].startswith("peft"):
                        continue
                    model = copy.deepcopy(plain)
                    gc.collect()
                    began = time.perf_counter()
                    model = starts[arm](model)
                    found[beside][arm].append((time.perf_counter() - began) * 1e3)
                    if turn == 0 and beside == QUIET:
                        check(arm, model, ids, expected)
    return {beside: {arm: Timing(tuple(values)) for arm, values in each.items()} for beside, each in found.items()}


def check(arm: Arm, model: nn.Module, ids: Tensor, expected: Tensor) -> None:
    """Raise where the adapted model does not compute what the plain one does."""
    with torch.no_grad():
        got = model.eval()(ids).logits
    right = torch.allclose(got, expected, atol=1e-3) if arm[0].startswith("peft") else torch.equal(got, expected)
    if not right:
        raise RuntimeError(f"{arm}: the model changed by {(got - expected).abs().max():.1e}")


def rows_of(case: Case) -> list[dict[str, Any]]:
    """A row for each arm, quiet and busy."""
    found, rows = times(case), []
    layers = len(case.layers(case.build()))
    for beside, timings in found.items():
        for (provider, window), timing in timings.items():
            if not timing.rounds:
                continue
            row: dict[str, Any] = {"model": case.name, "provider": provider, "window": window, "beside": beside}
            row |= quantiles("seconds", Timing(tuple(ms / 1e3 for ms in timing.rounds)))
            row |= quantiles("ratio", over(timing, found[QUIET][YARDSTICK]))
            row["over_quiet"] = f"{over(timing, found[QUIET][provider, window]).quantile(0.5):.2f}"
            row |= {"rounds": len(timing.rounds), "layers": layers, "rank": RANK, "dtype": "float32"}
            rows.append(row | facts(torch.device("cpu")))
            print(*[*row.values()][:12], sep=", ")
    return rows


def over(timing: Timing, other: Timing) -> Timing:
    """The ratios, round by round."""
    return Timing(tuple(a / b for a, b in zip(timing.rounds, other.rounds, strict=True)))


def quantiles(name: str, values: Timing) -> dict[str, str]:
    """The median and the quartiles."""
    parts = {name: 0.5, f"{name}_low": 0.25, f"{name}_high": 0.75}
    return {column: f"{values.quantile(q):.3f}" for column, q in parts.items()}


def main() -> None:
    """Measure and write ``start_cpu.csv`` anew, with two threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    file = parser.parse_args().out / "start_cpu.csv"
    file.unlink(missing_ok=True)
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")  # of PEFT, that a model with random weights has no name
    for case in CASES:
        append_rows(file, rows_of(case), COLUMNS)


if __name__ == "__main__":
    main()
