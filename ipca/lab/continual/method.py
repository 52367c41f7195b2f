"""What a method of continual learning is: how a task begins and ends, what it adds to the loss, what it keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ipca.model.apply import adapted_layers
from ipca.model.merge import unload
from ipca.model.settings import AdapterSettings
from ipca.model.targets import Target
from ipca.nn.window_layer import WindowLayer
from ipca.svd import SpectralCache

Adapter = Mapping[str, WindowLayer]
"""The adapted layers of one task by path."""


@dataclass(frozen=True)
class Setup:
    """What a method is made from.

    Attributes:
        config: which layers, rank, alpha, form, and the window where the method has one.
        targets: the layers that ``config`` names.
        modules_to_save: paths of the modules that are fully trained in every task.
        tasks: how many there will be, where that is known.
        seed: of random factors; with the task's number and the layer's path it decides them.
        cache: of decompositions.
        orthogonality: O-LoRA's λ.
        protected: share of each layer's singular components that OSF protects.
    """

    config: AdapterSettings
    targets: tuple[Target, ...]
    modules_to_save: tuple[str, ...]
    tasks: int | None
    seed: int
    cache: SpectralCache | None
    orthogonality: float
    protected: float

    def seed_of(self, index: int) -> int:
        """The seed of task ``index``."""
        return task_seed(self.seed, index)


def task_seed(seed: int, index: int) -> int:
    """A seed for task ``index`` of a stream; other tasks and other streams' seeds below a million give others."""
    return seed + 1_000_003 * index


def fold(model: nn.Module) -> Adapter:
    """Fold every factor into its weight, and return the adapted layers that were there."""
    layers = adapted_layers(model)
    unload(model)
    return layers


def leave(model: nn.Module) -> Adapter:
    """Fold nothing: the same layers go on."""
    return {}


def _no_penalty(model: nn.Module) -> Tensor | None:
    return None


@dataclass(frozen=True)
class Method:
    """One method at work on one model.

    Attributes:
        begin: ``begin(model, index)`` puts the layers of task ``index`` in place; changes nothing where it fails.
        end: makes the task's change permanent and returns the layers that were folded.
        penalty: what training adds to the loss, or None.
        state: tensors outside the model that later tasks need.
        finish: makes the model plain after the last task.
    """

    begin: Callable[[nn.Module, int], None]
    end: Callable[[nn.Module], Adapter] = fold
    penalty: Callable[[nn.Module], Tensor | None] = _no_penalty
    state: Callable[[], Iterable[Tensor]] = tuple
    finish: Callable[[nn.Module], object] = leave
