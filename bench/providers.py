"""Providers of the pc_linear benchmark: layers on the same weight and factors, and their inputs.

``linear`` is a bare frozen ``nn.Linear``; ``ipca-…`` a ``LinearPC`` with that backend; ``peft-…`` stock PEFT's LoRA on
the residual weight, which computes the function of the residual form. Its three arms differ for 16-bit weights:
``peft-bf16`` has factors of the weight's dtype, ``peft-autocast`` float32 factors under ``torch.autocast``,
``peft-default`` float32 factors without it, the default of ``get_peft_model``. ``LinearPC`` has float32 factors there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import ipca
from bench.grid import Cell
from ipca._hashing import tensor_sha256
from ipca.nn import InitialFactors, LinearPC
from ipca.nn.initialization import certify_init, default_adapter_dtype

BACKENDS = ("triton", "addmm", "merged", "reference", "auto")
FORMS = ("residual", "intact")
ARMS = ("bf16", "autocast", "default")
"""The arms of PEFT."""

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Provider:
    """One layer: its name in the column ``provider``, its form, and whether torch.compile compiles it."""

    name: str
    form: str = ""
    compiled: bool = False

    @property
    def backend(self) -> str | None:
        """The backend that is set while it runs."""
        return self.name.removeprefix("ipca-") if self.name.startswith("ipca-") else None


IN_PEFT = Provider("PEFT with PCConfig", "intact")
"""``ipca.peft.PCConfig``: PEFT's layers with our op."""


def providers_for(cell: Cell) -> list[Provider]:
    """All providers measured in ``cell``, baselines of the ratios first."""
    arms = ARMS if cell.torch_dtype.itemsize == 2 else ("default",)
    peft = [f"peft-{arm}" for arm in arms]
    baselines = [Provider("linear"), *map(Provider, peft)]
    if cell.compiled:
        compiled = [Provider("ipca-auto", form, True) for form in FORMS] + [Provider(name, "", True) for name in peft]
        return baselines + compiled
    return baselines + [Provider(f"ipca-{backend}", form) for form in FORMS for backend in BACKENDS]


@contextmanager
def active(provider: Provider) -> Iterator[None]:
    """Set the provider's backend within the block."""
    if provider.backend is None:
        yield
        return
    before = ipca.set_backend(provider.backend)
    try:
        yield
    finally:
        ipca.set_backend(before)


@dataclass
class Sample:
    """Random inputs of a cell, determined by ``seed``, and the layers on its weight, built on first use.

    ``x`` and ``dy`` have the scale of activations and gradients; the low-rank branch has the scale of a window, and its
    trained factors are about half their size away from the initial ones.
    """

    cell: Cell
    device: torch.device
    seed: int
    layers: dict[str, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        M, N, K, r = self.cell.M, self.cell.N, self.cell.K, self.cell.rank
        self.generator = torch.Generator(self.device).manual_seed(self.seed)
        self.weight = self._random(N, K, K**-0.5)
        self.x = self._random(M, K, 1.0).requires_grad_()
        self.dy = self._random(M, N, 1.0)
        self.moved = self._random(r, K, K**-0.5), self._random(N, r, N**-0.5)

    def _random(self, rows: int, columns: int, scale: float) -> Tensor:
        dtype = self.cell.torch_dtype
        values = torch.randn(rows, columns, device=self.device, dtype=dtype, generator=self.generator)
        return values.mul_(scale)

    @cached_property
    def initial(self) -> InitialFactors:
        return random_factors(self.weight, self.cell.rank, self.generator)

    def layer(self, provider: Provider) -> nn.Module:
        """The layer of ``provider``, in training mode; providers that only run it differently share it."""
        key = (
            provider.name
            if provider == IN_PEFT
            else provider.form or {"peft-autocast": "peft-default"}.get(provider.name, provider.name)
        )
        if key not in self.layers:
            self.layers[key] = self._build(key).train()
        return self.layers[key]

    def _build(self, key: str) -> nn.Module:
        if key == IN_PEFT.name:
            return self._moved(window_in_peft(self.weight, self.initial, self.cell.dropout))
        if key in FORMS:
            return self._moved(linear_pc(self.weight, self.initial, key, self.cell.dropout))
        residual = self.layer(Provider("ipca-auto", "residual")).base_weight
        assert isinstance(residual, Tensor)
        base = plain_linear(residual)
        if key == "linear":
            return base
        return self._moved(peft_lora(base, self.cell.rank, self.cell.dropout, sixteen_bit=key == "peft-bf16"))

    @torch.no_grad()
    def _moved(self, layer: nn.Module) -> nn.Module:
        start = (self.initial.A0, self.initial.B0)
        for parameter, initial, moved in zip(trained(layer), start, self.moved, strict=True):
            parameter.copy_(initial + moved / 2)
        return layer


def random_factors(weight: Tensor, rank: int, generator: torch.Generator) -> InitialFactors:
    """Random factors with the scale of a middle window of ``weight (N, K)``, nearly orthogonal; no decomposition."""
    N, K = weight.shape
    adapter_dtype = default_adapter_dtype(weight.dtype)
    sigma = float(weight.float().norm()) / min(N, K) ** 0.5  # root mean square of the singular values

    def factor(rows: int, columns: int, size: int) -> Tensor:
        values = torch.randn(rows, columns, device=weight.device, generator=generator) * (sigma / size) ** 0.5
        return values.to(weight.dtype).to(adapter_dtype)

    A0, B0 = factor(rank, K, K), factor(N, rank, N)
    certificate = certify_init(weight, A0, B0, scaling=1.0, form="residual")
    return InitialFactors(A0, B0, ipca.Window(0, rank), "", None, certificate)


def linear_pc(weight: Tensor, initial: InitialFactors, form: str, dropout: float) -> LinearPC:
    """A LinearPC on ``weight`` with the factors ``initial``."""
    return LinearPC.from_factors(plain_linear(weight), initial, form=form, dropout=dropout)


def window_in_peft(weight: Tensor, initial: InitialFactors, dropout: float) -> nn.Module:
    """PEFT's layer on ``weight`` with a PCConfig and the factors ``initial``."""
    from ipca.peft import PCConfig

    rank = initial.window.rank
    config = PCConfig(r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=["layer"])
    digest = tensor_sha256(weight)
    config.records.initial["layer"] = InitialFactors(
        initial.A0, initial.B0, initial.window, digest, None, initial.certificate
    )
    return in_peft(plain_linear(weight), config)


def plain_linear(weight: Tensor) -> nn.Linear:
    """A frozen ``nn.Linear`` without bias that shares the memory of ``weight``."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear


def peft_lora(base: nn.Linear, rank: int, dropout: float, *, sixteen_bit: bool) -> nn.Module:
    """Stock PEFT's LoRA layer around the unchanged ``base``."""
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=["layer"])
    return in_peft(base, config, autocast_adapter_dtype=not sixteen_bit)


def in_peft(base: nn.Linear, config: LoraConfig, *, autocast_adapter_dtype: bool = True) -> nn.Module:
    """PEFT's layer around the unchanged ``base``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the missing config of the model
        model = get_peft_model(nn.ModuleDict({"layer": base}), config, autocast_adapter_dtype=autocast_adapter_dtype)
    return model.get_submodule("base_model.model.layer")


def trained(layer: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters, ``A`` before ``B``."""
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def layer_call(provider: Provider, sample: Sample) -> Layer:
    """``y = layer(x)`` as executed by a model that uses ``provider``."""
    module = sample.layer(provider)
    call: Layer = torch.compile(module, dynamic=False) if provider.compiled else module
    if provider.name != "peft-autocast":
        return call

    def autocast(x: Tensor) -> Tensor:
        with torch.autocast(sample.device.type, sample.cell.torch_dtype):
            return call(x)

    return autocast
