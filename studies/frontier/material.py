"""What a study is made of: a model, and for each new task what is trained on and how a tuned model is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor


class Measured(Protocol):
    """A measurement of a model."""

    def means(self) -> dict[str, float | None]:
        """``ce_new``, ``kl_`` and the name of each kept set, and more; None where a number is not finite."""

    def items(self) -> dict[str, Tensor]:
        """Values of single items ``(M, …)``, for :meth:`studies.frontier.analysis.Analysis.item_error`."""


class Reference(Protocol):
    """The base's outputs on the held-out and kept items of a task."""

    def measure(self, model: Any) -> Measured:
        """``model`` against the base; one and the same model diverges by exactly 0."""


class Task(Protocol):
    """A new task, with what shall be kept.

    Attributes:
        train: training items, along the first dimension.
        kind: what they are, the name of their hash in the rows.
    """

    kind: ClassVar[str]

    @property
    def train(self) -> Tensor: ...

    def loss(self, model: Any, chosen: Tensor) -> Tensor:
        """The mean loss of the training items ``chosen``."""

    def reference(self, model: Any) -> Reference:
        """What measures models against the base ``model``."""

    def inputs(self, of: str, model: Any) -> Sequence[Any]:
        """Batches for an arm that looks at inputs: of the ``"new"`` task, or of the ``"base"``.

        Raises:
            ValueError: the task has no such inputs.
        """

    def sha256(self) -> str:
        """A hash of all items."""
