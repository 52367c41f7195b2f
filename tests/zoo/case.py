"""One architecture under test: its models, adapted and trained, and what they computed; each made once."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from torch import Tensor, nn

import ipca
from ipca.peft import PCConfig
from tests.zoo.models.tiny import Architecture, build
from tests.zoo.outputs import Outputs, difference, loss, perturb, run
from tests.zoo.selections import SELECTIONS

RANK = 4
TOL = 4e-5
"""What rounding may change in float32, relative to the largest output, where the plain model's own error is less."""
LARGEST_NOISE = 5e-4
"""Above this the difference to float64 is no rounding: a hash or a router has chosen otherwise."""


class Way(NamedTuple):
    """A way to adapt a model.

    Attributes:
        selection: which layers, see :mod:`tests.zoo.selections`.
        form: ``"intact"`` or ``"residual"`` by ``apply_pc``; ``"peft"``: PEFT's model with a PCConfig.
    """

    selection: str
    form: str


class NeedsError(Exception):
    """A check cannot run because what it begins with failed."""


class NotApplicableError(Exception):
    """The model has nothing of what is checked."""


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Cache what a method of :class:`Case` returns or raises: the second time :class:`NeedsError`."""

    @functools.wraps(function)
    def cached(case: Case, *args: Any) -> Any:
        key = (function.__name__, *args)
        if key not in case.made:
            case.made[key] = NeedsError(f"needs {'.'.join([*(args[0] if args else ()), function.__name__])}")
            case.made[key] = function(case, *args)
        if isinstance(case.made[key], Exception):
            raise case.made[key]
        return case.made[key]

    return cached


def rounding(model: nn.Module, inputs: dict[str, Any], found: Outputs) -> float:
    """The error of ``found``, computed in float32, against float64; 0 where that says nothing about rounding."""
    double = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    try:
        noise = difference([output.double() for output in found], run(copy.deepcopy(model).double(), double))
    except Exception:  # a dtype that the model's code fixes
        return 0.0
    return noise if noise <= LARGEST_NOISE else 0.0


class Case:
    """What the checks of one architecture share.

    Args:
        name: of the architecture.
        folder: an empty folder; what stock PEFT has to load is left in it.
    """

    def __init__(self, name: str, architecture: Architecture, folder: Path) -> None:
        self.name, self.architecture, self.folder = name, architecture, folder
        self.made: dict[Any, Any] = {}
        self.told: dict[str, list[str]] = {}
        self.plain, self.inputs = build(architecture)
        self.plain.requires_grad_(False)  # as adapting leaves it: attention takes another path where weights train
        self.wanted = run(self.plain, self.inputs)
        self.noise = rounding(self.plain, self.inputs, self.wanted)
        self.tol = max(TOL, 2 * self.noise)

    def fresh(self) -> nn.Module:
        """The plain model."""
        return build(self.architecture)[0]

    @once
    def gradients(self) -> dict[str, Tensor | None]:
        """The plain model's gradients, by parameter."""
        model = self.fresh().requires_grad_(True)
        loss(model, self.inputs).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters(remove_duplicate=False)}

    @once
    def selected(self, way: Way) -> Any:
        """The layers to adapt: arguments of ``apply_pc``, or of PCConfig."""
        found = SELECTIONS[way.selection](self.plain, RANK)
        if found is None:
            raise NotApplicableError(f"no layers of the kind {way.selection!r}")
        return found.in_peft if way.form == "peft" else found.native

    @once
    def apply(self, way: Way) -> nn.Module:
        """The adapted model, not to be changed."""
        if way.form == "peft":
            return get_peft_model(self.fresh(), PCConfig(r=RANK, window="middle", **self.selected(way))).eval()
        return ipca.apply_pc(self.fresh(), rank=RANK, form=way.form, progress=False, **self.selected(way))

    def adapted(self, way: Way) -> nn.Module:
        """An adapted model of one's own."""
        return copy.deepcopy(self.apply(way))

    @once
    def train(self, way: Way) -> tuple[nn.Module, Outputs]:
        """A model with other factors, not to be changed, and what it computes."""
        model = self.adapted(way)
        perturb(trainable(model))
        return model, run(model, self.inputs)

    def trained(self, way: Way) -> tuple[nn.Module, Outputs]:
        """A trained model of one's own, and what it computes."""
        model, wanted = self.train(way)
        return copy.deepcopy(model), wanted

    @once
    def save(self, way: Way) -> Path:
        """The folder of the trained adapter."""
        model, _ = self.trained(way)
        write = model.save_pretrained if way.form == "peft" else functools.partial(ipca.save_adapter, model)
        return self.leave(way, ".".join(way), write)

    def leave(self, way: Way, name: str, write: Callable[[Path], object]) -> Path:
        """Have the trained adapter written to a folder, which stock PEFT loads later in another process."""
        folder = self.folder / "adapters" / name
        self.told[name] = warned(lambda: write(folder))
        case = {"inputs": self.inputs, "outputs": self.train(way)[1], "told": self.told[name]}
        case["noise"] = self.noise
        torch.save(case, self.folder / f"{name}.pt")
        return folder


def warned(function: Callable[[], object]) -> list[str]:
    """What ``function`` warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return sorted({str(w.message) for w in caught if issubclass(w.category, UserWarning | RuntimeWarning)})


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
