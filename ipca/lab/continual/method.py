"""The interface of a continual-learning method: how a task begins and ends, its penalty, its state."""

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
    """The inputs a method is built from.

    Attributes:
        settings: layers, rank, alpha and form, and the window where the method has one.
        targets: the layers that ``settings`` selects.
        modules_to_save: paths of the modules that are fully trained in every task.
        tasks: the number of tasks, if known.
        seed: of random factors; together with the task's index and the layer's path it determines them.
        cache: of decompositions.
        orthogonality: O-LoRA's λ.
        protected: share of each layer's singular components that OSF protects.
    """

    settings: AdapterSettings
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
    """The seed of task ``index`` of a stream; distinct for all tasks of streams with seeds below one million."""
    return seed + 1_000_003 * index


def fold(model: nn.Module) -> Adapter:
    """Fold all factors into their weights; return the adapted layers that were removed."""
    layers = adapted_layers(model)
    unload(model)
    return layers


def fold_nothing(model: nn.Module) -> Adapter:
    """Keep the adapted layers in the model: the next task continues with them."""
    return {}


def _no_penalty(model: nn.Module) -> Tensor | None:
    return None


@dataclass(frozen=True)
class Method:
    """One method applied to one model.

    Attributes:
        begin: ``begin(model, index)`` installs the layers of task ``index``; if it fails, the model is unchanged.
        end: makes the task's change permanent and returns the layers that were folded.
        penalty: the term training adds to the loss, or None.
        state: tensors outside the model that later tasks need.
        finish: makes the model plain after the last task.
    """

    begin: Callable[[nn.Module, int], None]
    end: Callable[[nn.Module], Adapter] = fold
    penalty: Callable[[nn.Module], Tensor | None] = _no_penalty
    state: Callable[[], Iterable[Tensor]] = tuple
    finish: Callable[[nn.Module], object] = fold_nothing
