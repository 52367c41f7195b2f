"""ContinualLearner: a model that learns one task after another, by windows of its weights or by a baseline."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from ipca.lab.continual.checks import check_options, check_room, find_layers
from ipca.lab.continual.kept import factors, save_stock, take_out, without_weights
from ipca.lab.continual.method import Adapter, Setup
from ipca.lab.continual.methods import find_kind
from ipca.model.apply import adapted_layers
from ipca.model.settings import AdapterSettings
from ipca.svd import SpectralCache

ORTHOGONALITY, PROTECTED = 0.5, 0.5


@dataclass(frozen=True)
class TaskRecord:
    """The cost of one task.

    Attributes:
        trained: parameters that trained, fully trained modules included.
        kept_parameters, kept_bytes: what the model and the method hold after it beyond the model of the beginning.
    """

    trained: int
    kept_parameters: int
    kept_bytes: int


class ContinualLearner:
    """Adapts ``model`` for one task after another; training is the caller's, with any optimizer and any loop.

    >>> learner = ContinualLearner(model, "disjoint", AdapterSettings(rank=8), tasks=5)
    >>> for task in tasks:
    ...     optimizer = torch.optim.AdamW(learner.begin_task(), lr=1e-3, weight_decay=0)
    ...     for x, y in task:
    ...         loss = loss_of(model(x), y) + learner.penalty()
    ...         ...
    ...     learner.end_task()
    >>> model = learner.finish()

    Between tasks the model computes all that was learned so far. No data of earlier tasks are used.

    Args:
        model: plain; changed in place.
        method: one of ``ipca.lab.continual.METHODS``:

            ==============  ========================================================================================
            ``fresh``       the window of the weights as they are when the task begins
            ``fixed``       the same window of the original weights for every task
            ``disjoint``    another window of the original weights for every task; needs ``tasks``
            ``pissa``       ``fresh`` with the largest components
            ``milora``      ``fresh`` with the smallest components
            ``lora``        one plain LoRA that goes on training
            ``lora-fresh``  a new plain LoRA for every task
            ``o-lora``      the same, its rows driven away from those of earlier tasks by :meth:`penalty`
            ``sd-lora``     earlier updates as normalized directions, whose magnitudes train too
            ``osf``         all but the largest components, by PEFT; says nothing to rank, alpha, window and form
            ==============  ========================================================================================

        config: layers, rank, alpha, form, window, and the modules that are fully trained in every task.
        tasks: how many tasks there will be; a further one is refused.
        keep: keep the factors of every task, which are folded into the weights when it ends, so that
            :meth:`remove_task` and :meth:`save_task` can name them. For methods that fold.
        frozen: ``"A"`` or ``"B"``, a factor that does not train; of plain LoRA ``"A"`` alone, since ``B`` begins at 0.
            With ``"disjoint"`` and ``"A"`` tasks cannot touch what another task's window reads (see docs/continual.md).
        seed: of random factors.
        cache: a folder, or a :class:`ipca.SpectralCache`, of decompositions.
        orthogonality: O-LoRA's λ; default 0.5.
        protected: share of each layer's components that OSF protects; default 0.5.

    Attributes:
        records: a :class:`TaskRecord` for each task that has ended.
        kept: the factors of each task that is kept, by its number.

    Raises:
        TypeError, ValueError: a bad argument, or a layer cannot be adapted; the message names it. The model is
            unchanged.
        ImportError: ``osf`` without PEFT.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str,
        config: AdapterSettings,
        *,
        tasks: int | None = None,
        keep: bool = False,
        frozen: str | None = None,
        seed: int = 0,
        cache: SpectralCache | str | os.PathLike[str] | None = None,
        orthogonality: float | None = None,
        protected: float | None = None,
    ) -> None:
        kind = find_kind(method)
        check_options(method, kind, tasks, keep, frozen, orthogonality, protected)
        targets, modules_to_save = find_layers(model, method, kind, config)
        if method == "disjoint" and tasks is not None:
            check_room(model, targets, tasks)
        setup = Setup(
            config=config,
            targets=tuple(targets),
            modules_to_save=tuple(modules_to_save),
            tasks=tasks,
            seed=seed,
            cache=cache if isinstance(cache, SpectralCache | None) else SpectralCache(cache),
            orthogonality=ORTHOGONALITY if orthogonality is None else orthogonality,
            protected=PROTECTED if protected is None else protected,
        )
        self.model, self.method, self.tasks, self.seed = model, method, tasks, seed
        self.keep, self.frozen = keep, frozen
        self._method = kind.make(setup)
        self._plain = _size(_tensors(model))
        self._trained: int | None = None
        self._finished = False
        self.records: list[TaskRecord] = []
        self.kept: dict[int, Adapter] = {}

    @property
    def running(self) -> bool:
        """Whether a task has begun and not ended."""
        return self._trained is not None

    def begin_task(self) -> list[nn.Parameter]:
        """Adapt the model for the next task; its function stays as it was.

        Returns:
            The parameters that train, for the optimizer; ``ipca.param_groups(model, lr)`` gives them with rates.

        Raises:
            RuntimeError: a task is running, or all are done.
            TypeError, ValueError, RuntimeError: as :func:`ipca.apply_pc`. The model is unchanged in every case.
        """
        index = len(self.records)
        if self._finished:
            raise RuntimeError("this learner has finished; make a new one to go on.")
        if self.running:
            raise RuntimeError(f"task {index} is still running; call end_task() first.")
        if self.tasks is not None and index >= self.tasks:
            raise RuntimeError(f"all {self.tasks} tasks are done; call finish(), or make a learner with more tasks.")
        self._method.begin(self.model, index)
        if self.frozen:
            for layer in adapted_layers(self.model).values():
                layer.get_parameter(f"lora_{self.frozen}").requires_grad_(False)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._trained = sum(p.numel() for p in parameters)
        return parameters

    def penalty(self) -> Tensor:
        """What to add to the loss of every step, a scalar; 0 for all methods but ``o-lora``, and in its first task."""
        self._require_running("penalty")
        found = self._method.penalty(self.model)
        return next(self.model.parameters()).new_zeros(()) if found is None else found

    def end_task(self) -> TaskRecord:
        """Make the task's change permanent; the model computes what it computed when training ended.

        Methods that fold give plain layers back, new objects, up to one rounding of the weights.

        Raises:
            RuntimeError: no task is running.
            ValueError: what was trained holds NaN or Inf, the message names it. Nothing is folded, the task still runs.
        """
        self._require_running("end_task")
        assert self._trained is not None
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not bool(parameter.isfinite().all()):
                raise ValueError(
                    f"task {len(self.records)}: {name} holds NaN or Inf, so training diverged; nothing was folded into "
                    "the weights. Go on from what you saved before this task, at a lower learning rate."
                )
        layers = self._method.end(self.model)
        if self.keep:
            self.kept[len(self.records)] = without_weights(layers)
        held = _size([*_tensors(self.model), *self._method.state(), *self._kept_tensors()])
        record = TaskRecord(self._trained, held[0] - self._plain[0], held[1] - self._plain[1])
        self._trained = None
        self.records.append(record)
        return record

    def remove_task(self, task: int) -> None:
        """Take the change that task number ``task`` made out of the weights again, up to one rounding of them.

        What later tasks learned, and fully trained modules, stay.

        Raises:
            RuntimeError: a task is running.
            ValueError: the task is not kept.
        """
        if self.running:
            raise RuntimeError(f"task {len(self.records)} is still running; call end_task() first.")
        take_out(self.model, self._kept(task))
        del self.kept[task]

    def save_task(self, task: int, folder: str | os.PathLike[str], *, base_model: str | None = None) -> None:
        """Write the change that task number ``task`` made to the weights as a stock PEFT LoRA of twice the rank.

        It is a difference: added to the original base by PEFT it gives what this task alone changed, and with all
        tasks' adapters the weights as they are now, up to rounding. Fully trained modules are not in it.

        Raises:
            ValueError: the task is not kept, or PEFT's format cannot hold its layers.
            OSError: ``folder`` cannot be written; what was there is intact.
        """
        save_stock(self.model, self._kept(task), folder, base_model)

    def finish(self) -> nn.Module:
        """Fold what is still adapted into the weights: a plain model, with which the learner is done.

        Raises:
            RuntimeError: a task is running.
        """
        if self.running:
            raise RuntimeError(f"task {len(self.records)} is still running; call end_task() first.")
        if self.records and not self._finished:
            self._method.finish(self.model)
        self._finished = True
        return self.model

    def _require_running(self, what: str) -> None:
        if not self.running:
            raise RuntimeError(f"no task is running; call begin_task() before {what}().")

    def _kept(self, task: int) -> Adapter:
        if task not in self.kept:
            held = ", ".join(map(str, self.kept)) or "none"
            hint = "" if self.keep else " A learner with keep=True keeps the factors of every task."
            raise ValueError(f"the factors of task {task} are not kept; kept: {held}.{hint}")
        return self.kept[task]

    def _kept_tensors(self) -> list[Tensor]:
        return [tensor for layers in self.kept.values() for tensor in factors(layers)]


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _size(tensors: Iterable[Tensor]) -> tuple[int, int]:
    """Entries and bytes of ``tensors``; shared memory counts once, the meta device not at all."""
    found = {(t.untyped_storage().data_ptr(), t.numel(), t.dtype): t for t in tensors if not t.is_meta}
    return sum(t.numel() for t in found.values()), sum(t.numel() * t.element_size() for t in found.values())
