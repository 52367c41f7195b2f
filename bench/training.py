"""Benchmark of whole training steps of a LLaMA-shaped model: tokens/s, peak memory and losses against stock PEFT.

    python -m bench.training --out DIR

All providers start from the same function, weights and factors and see the same batches, so their losses must agree
step by step. The models take their steps in turn, so that drift of the machine's speed affects them equally. One CSV
row per provider and step.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from bench.providers import IN_PEFT, Provider, linear_pc, plain_linear, random_factors
from bench.result_tables import training_table
from bench.rows import FACTS, RESULTS, Row, append_rows, device_name, facts, read_rows, same_run, slug
from bench.timing import synchronize
from ipca._hashing import tensor_sha256
from ipca.nn import InitCertificate, InitialFactors, LinearPC
from ipca.nn.registry import set_layer

COLUMNS = (
    *("provider", "form", "step", "loss", "loss_difference", "status", "seconds", "tokens_per_s", "peak_mib"),
    *("parameters", "layers", "hidden", "rank", "batch", "length", "dtype", *FACTS),
)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Relative tolerance of losses to the first provider; bf16 factors and activations round at every step."""


@dataclass(frozen=True)
class Settings:
    """The LLaMA-shaped model and its training."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    batch: int
    length: int
    steps: int
    dtype: str
    rank: int = 16
    lr: float = 1e-3
    batches: int = 4


SMALL = Settings(256, 688, 4, 4, 2, 2048, batch=2, length=256, steps=20, dtype="float32")
BILLION = Settings(2048, 5632, 22, 32, 4, 32000, batch=4, length=2048, steps=24, dtype="bfloat16")
"""The shape of TinyLlama-1.1B."""


@dataclass
class Run:
    """One provider's model in training: its inputs for a step, and the memory it holds between steps."""

    provider: Provider
    model: nn.Module
    optimizer: torch.optim.Optimizer
    setting: Callable[[], AbstractContextManager[object]]
    held_mib: float = 0.0
    losses: list[float] = field(default_factory=list)


def providers_of(settings: Settings) -> list[Provider]:
    """All providers, PEFT's default first: the losses of the others must agree with it."""
    arms = ("autocast", "bf16") if settings.dtype == "bfloat16" else ()
    ours = [Provider("ipca-auto", form) for form in ("residual", "intact")]
    in_peft = [IN_PEFT] if Version(peft.__version__) >= Version("0.21") else []  # older versions lack the hook
    return [Provider("peft-default"), *ours, *in_peft, *(Provider(f"peft-{arm}") for arm in arms)]


def build(provider: Provider, settings: Settings, device: torch.device) -> Run:
    """The model with every linear layer of its blocks adapted; the same random seeds for every provider."""
    before = _allocated(device)
    model = plain_model(settings, device)
    generator = torch.Generator(device).manual_seed(1)
    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.Linear) and name.endswith(TARGETS):
            initial = random_factors(module.weight.detach(), settings.rank, generator)
            form = provider.form or "residual"
            set_layer(model, name, linear_pc(module.weight, initial, form, dropout=0.0))
    if provider == IN_PEFT:
        model = as_window_in_peft(model, settings.rank)
    elif provider.backend is None:
        model = as_peft(model, settings.rank, sixteen_bit=provider.name == "peft-bf16")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_A" in name or "lora_B" in name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    setting: Callable[[], AbstractContextManager[object]] = nullcontext
    if provider.name == "peft-autocast":
        setting = partial(torch.autocast, device.type, torch.bfloat16)
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0)
    return Run(provider, model.train(), optimizer, setting, _allocated(device) - before)


def plain_model(settings: Settings, device: torch.device) -> nn.Module:
    """A LLaMA with random weights."""
    config: Any = LlamaConfig(  # type: ignore[call-arg]
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        vocab_size=settings.vocabulary,
        max_position_embeddings=settings.length,
        initializer_range=settings.hidden
        ** -0.5,  # about 0.02 at full width; a smaller one would make the small model inert
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(getattr(torch, settings.dtype))


def as_peft(model: nn.Module, rank: int, *, sixteen_bit: bool) -> nn.Module:
    """The same function under stock PEFT: the residual weights as the base, the window's factors as the adapter."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LinearPC)}
    for name, layer in layers.items():
        set_layer(model, name, plain_linear(layer.base_weight))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS))
    adapted = get_peft_model(model, config, autocast_adapter_dtype=not sixteen_bit)
    with torch.no_grad():
        for name, layer in layers.items():
            lora = f"base_model.model.{name}"
            adapted.get_parameter(f"{lora}.lora_A.default.weight").copy_(layer.lora_A0)
            adapted.get_parameter(f"{lora}.lora_B.default.weight").copy_(layer.lora_B0)
    return adapted


def as_window_in_peft(model: nn.Module, rank: int) -> nn.Module:
    """The same function and factors in PEFT's layers with a PCConfig."""
    from ipca.peft import PCConfig

    config = PCConfig(r=rank, target_modules=list(TARGETS))
    for name, layer in [(name, module) for name, module in model.named_modules() if isinstance(module, LinearPC)]:
        set_layer(model, name, plain_linear(layer.base_weight))
        digest, certificate = tensor_sha256(layer.base_weight), InitCertificate("", 0.0, 0.0, 0.0)
        assert layer.window is not None
        factors = (layer.lora_A0, layer.lora_B0)
        config.records.initial[name] = InitialFactors(*factors, layer.window, digest, None, certificate)
    return get_peft_model(model, config)


def token_batches(settings: Settings, device: torch.device) -> list[Tensor]:
    """Fixed random tokens ``(batch, length)``; a few batches that repeat, so that there is something to learn."""
    generator = torch.Generator().manual_seed(2)
    shape = (settings.batch, settings.length)
    return [torch.randint(settings.vocabulary, shape, generator=generator).to(device) for _ in range(settings.batches)]


def step(run: Run, tokens: Tensor, device: torch.device) -> tuple[float, float]:
    """One training step: its seconds, and the peak memory in MiB as if this were the only model."""
    synchronize(device)
    before = _allocated(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    run.optimizer.zero_grad()
    with run.setting():
        loss = run.model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    run.optimizer.step()
    synchronize(device)
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
    run.losses.append(loss.item())
    del loss
    peak_alone = run.held_mib + peak - before
    run.held_mib += _allocated(device) - before
    return seconds, peak_alone


def steps(runs: Sequence[Run], settings: Settings, device: torch.device, deadline: float) -> Iterator[list[Row]]:
    """The rows of each step, taken by all models in turn, until time runs out."""
    batches = token_batches(settings, device)
    size = {name: getattr(settings, name) for name in ("layers", "hidden", "rank", "batch", "length", "dtype")}
    size["parameters"] = sum(p.numel() for p in plain_model(settings, torch.device("meta")).parameters())
    for number in tqdm(range(settings.steps), desc="Steps", unit="step"):
        if time.perf_counter() > deadline:
            return
        rows = []
        for run in runs:
            seconds, peak = step(run, batches[number % len(batches)], device)
            rows.append(size | row_of(run, runs[0], number, seconds, settings))
            rows[-1]["peak_mib"] = f"{peak:.0f}" if device.type == "cuda" else ""
        yield rows


def row_of(run: Run, first: Run, number: int, seconds: float, settings: Settings) -> Row:
    """The row of one step of one model; "wrong" if its loss differs from that of the first provider."""
    loss, expected = run.losses[-1], first.losses[-1]
    difference = abs(loss - expected) / abs(expected)
    return {
        "provider": run.provider.name,
        "form": run.provider.form,
        "step": number,
        "loss": f"{loss:.6f}",
        "loss_difference": f"{difference:.3e}",
        "status": "ok" if difference <= TOLERANCE[settings.dtype] else "wrong",
        "seconds": f"{seconds:.5f}",
        "tokens_per_s": f"{settings.batch * settings.length / seconds:.1f}",
    }


def run_training(
    settings: Settings, path: Path, device: torch.device, seconds: float, who: Sequence[Provider] = ()
) -> list[dict[str, str]]:
    """Train ``who``, by default all, and overwrite ``path``, unless it has a complete run of this device and commit."""
    deadline = time.perf_counter() + seconds
    about_run = facts(device)
    found = same_run(read_rows(path), about_run["device"], about_run["commit"])
    if found and int(found[-1]["step"]) == settings.steps - 1:
        return found
    path.unlink(missing_ok=True)
    runs = [build(provider, settings, device) for provider in who or providers_of(settings)]
    for rows in steps(runs, settings, device, deadline):
        append_rows(path, [row | about_run for row in rows], COLUMNS)
    return read_rows(path)


def main() -> int:
    """Train; return 1 if a loss is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file (default: bench/results)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no step after this")
    args = parser.parse_args()
    device = torch.device(args.device)
    path = args.out / f"training_{slug(device_name(device))}.csv"
    rows = run_training(BILLION if args.device == "cuda" else SMALL, path, device, args.seconds)
    print(f"{training_table(rows)}\n{path}" if rows else "out of time before the first step")
    return int(any(row["status"] != "ok" for row in rows))


def _allocated(device: torch.device) -> float:
    """MiB in use; 0 on a CPU, where it is not tracked."""
    return torch.cuda.memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0


if __name__ == "__main__":
    sys.exit(main())
