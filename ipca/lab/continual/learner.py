"""ContinualLearner: a model that learns one task after another, by windows of its weights or by a baseline."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ipca._atomic import staged_files
from ipca.io.output_folder import check_output, is_adapter_file
from ipca.io.peft_format import LayerFormat, adapter_tensors, readable_config, write_peft
from ipca.lab.continual.method import Adapter, Setup
from ipca.lab.continual.methods import (
    OTHER_FACTOR,
    check_options,
    check_room,
    find_kind,
    find_layers,
    frozen_factor,
)
from ipca.model.apply import check_can_train
from ipca.model.settings import AdapterSettings
from ipca.nn.initialization import add_low_rank
from ipca.nn.layer_kinds import read_layer, write_matrix
from ipca.nn.registry import get_layer
from ipca.svd import SpectralCache

ORTHOGONALITY, PROTECTED = 0.5, 0.5


@dataclass(frozen=True)
class TaskRecord:
    """The cost of one task.

    Attributes:
        trained: number of trained parameters, including fully trained modules.
        kept_parameters, kept_bytes: what the model and the method hold after the task beyond the initial model.
    """

    trained: int
    kept_parameters: int
    kept_bytes: int


class ContinualLearner:
    """Adapts ``model`` for one task after another; the caller trains, with any optimizer and any loop.

    >>> model, settings = nn.Sequential(nn.Linear(64, 32)), ipca.model.AdapterSettings(rank=4)
    >>> learner = ipca.lab.continual.ContinualLearner(model, "disjoint", settings, tasks=2)
    >>> for task in range(2):
    ...     optimizer = torch.optim.AdamW(learner.begin_task(), lr=1e-3, weight_decay=0)
    ...     loss = model(torch.ones(1, 64)).square().mean() + learner.penalty()
    ...     loss.backward()
    ...     optimizer.step()
    ...     print(learner.end_task().trained)
    384
    384
    >>> model = learner.finish()

    Between tasks the model computes everything learned so far. No data of earlier tasks is used.

    Args:
        model: a plain model; changed in place.
        method: one of ``ipca.lab.continual.METHODS``:

            ==============  ========================================================================================
            ``fresh``       the window of the weights as they are when the task begins
            ``fixed``       the same window of the original weights for every task
            ``disjoint``    another window of the original weights for every task; needs ``tasks``
            ``pissa``       ``fresh`` with the largest components
            ``milora``      ``fresh`` with the smallest components
            ``lora``        one plain LoRA that keeps training
            ``lora-fresh``  a new plain LoRA for every task
            ``o-lora``      the same, with rows pushed away from those of earlier tasks by :meth:`penalty`
            ``sd-lora``     earlier updates as normalized directions, whose magnitudes train too
            ``osf``         all but the largest components, with PEFT; ignores rank, alpha, window and form
            ==============  ========================================================================================

        settings: layers, rank, alpha, form, window, and the modules that are fully trained in every task.
        tasks: the number of tasks; more are refused.
        keep: keep the factors of every task after they are folded into the weights, so that :meth:`remove_task` and
            :meth:`save_task` can use them. For methods that fold.
        frozen: ``"A"`` or ``"B"``, a factor that does not train; the same as ``train`` of the settings, which names the
            other one. For plain LoRA only ``"A"``, since ``B`` starts at 0.
            With ``"disjoint"`` and ``"A"`` a task cannot change what another task's window reads (docs/continual.md).
        seed: of random factors.
        cache: a folder or an :class:`ipca.SpectralCache` of decompositions.
        orthogonality: O-LoRA's λ; default 0.5.
        protected: share of each layer's components that OSF protects; default 0.5.

    Attributes:
        records: a :class:`TaskRecord` for each task that has ended.
        kept: the factors of each kept task by its index.

    Raises:
        TypeError, ValueError: an invalid argument, or a layer that cannot be adapted; the message names it. The model
            is unchanged.
        ImportError: ``osf`` without PEFT.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str,
        settings: AdapterSettings,
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
        frozen = frozen_factor(settings, frozen)
        check_options(method, kind, tasks, keep, frozen, orthogonality, protected)
        check_can_train(model)
        settings = replace(settings, train=OTHER_FACTOR.get(frozen or "", "both"))
        targets, modules_to_save = find_layers(model, method, kind, settings)
        if method == "disjoint" and tasks is not None:
            check_room(targets, tasks)
        setup = Setup(
            settings=settings,
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
        self._initial_size = _size(_tensors(model))
        self._trained: int | None = None
        self._finished = False
        self.records: list[TaskRecord] = []
        self.kept: dict[int, Adapter] = {}

    @property
    def running(self) -> bool:
        """Whether a task has begun and not ended."""
        return self._trained is not None

    def begin_task(self) -> list[nn.Parameter]:
        """Adapt the model for the next task; its function does not change.

        Returns:
            The trainable parameters, for the optimizer; ``ipca.param_groups(model, lr)`` returns them with rates.

        Raises:
            RuntimeError: a task is running, or all tasks are done.
            TypeError, ValueError, RuntimeError: as :func:`ipca.apply_pc`. The model is unchanged in every case.
        """
        index = len(self.records)
        if self._finished:
            raise RuntimeError("this learner has finished; create a new one to continue.")
        check_can_train(self.model)
        if self.running:
            raise RuntimeError(f"task {index} is still running; call end_task() first.")
        if self.tasks is not None and index >= self.tasks:
            raise RuntimeError(f"all {self.tasks} tasks are done; call finish(), or create a learner for more tasks.")
        self._method.begin(self.model, index)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._trained = sum(p.numel() for p in parameters)
        return parameters

    def penalty(self) -> Tensor:
        """The term to add to the loss of every step, a scalar; 0 except for ``o-lora`` after its first task."""
        self._require_running("penalty")
        found = self._method.penalty(self.model)
        return next(self.model.parameters()).new_zeros(()) if found is None else found

    def end_task(self) -> TaskRecord:
        """Make the task's change permanent; the model computes what it computed when training ended.

        Methods that fold restore plain layers (new objects), up to one rounding of the weights.

        Raises:
            RuntimeError: no task is running.
            ValueError: a trained parameter holds NaN or Inf; the message names it. Nothing is folded, and the task is
                still running.
        """
        self._require_running("end_task")
        assert self._trained is not None
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not bool(parameter.isfinite().all()):
                raise ValueError(
                    f"task {len(self.records)}: {name} holds NaN or Inf, so training diverged; nothing was folded into "
                    "the weights. Restart from what you saved before this task, at a lower learning rate."
                )
        layers = self._method.end(self.model)
        if self.keep:
            self.kept[len(self.records)] = _without_weights(layers)
        held = _size([*_tensors(self.model), *self._method.state(), *self._kept_tensors()])
        record = TaskRecord(self._trained, held[0] - self._initial_size[0], held[1] - self._initial_size[1])
        self._trained = None
        self.records.append(record)
        return record

    def remove_task(self, task: int) -> None:
        """Subtract the change of task number ``task`` from the weights, up to one rounding of them.

        What later tasks learned, and fully trained modules, stay.

        Raises:
            RuntimeError: a task is running.
            ValueError: the task is not kept.
        """
        if self.running:
            raise RuntimeError(f"task {len(self.records)} is still running; call end_task() first.")
        _subtract_change(self.model, self._kept(task))
        del self.kept[task]

    def save_task(
        self,
        task: int,
        folder: str | os.PathLike[str],
        *,
        base_model: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the change that task number ``task`` made to the weights as a stock PEFT LoRA of twice the rank.

        It is a difference: added to the original base by PEFT it gives what this task changed, and together with all
        other tasks' adapters the current weights, up to rounding. Fully trained modules are not included.

        Args:
            task: its index.
            folder: where to write; made if missing.
            base_model: name or path of the base, for PEFT's ``base_model_name_or_path``.
            overwrite: replace weights and adapters that ``folder`` holds.

        Raises:
            ValueError: the task is not kept, or PEFT's format cannot hold its layers.
            FileExistsError: ``folder`` holds weights or an adapter, and not ``overwrite``.
            OSError: ``folder`` cannot be written; its previous content is intact.
        """
        check_output(folder, overwrite=overwrite)
        _save_as_peft(self.model, self._kept(task), folder, base_model)

    def finish(self) -> nn.Module:
        """Fold all remaining factors into the weights and return the plain model; ends the use of this learner.

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
        layers = [layer for adapter in self.kept.values() for layer in adapter.values()]
        return [factor for layer in layers for factor in (layer.lora_A, layer.lora_B, layer.lora_A0, layer.lora_B0)]


def _without_weights(layers: Adapter) -> Adapter:
    """``layers``, which have been removed from their model, stripped of weight and bias: only the factors stay."""
    for layer in layers.values():
        layer.base_weight = nn.Parameter(torch.empty_like(layer.base_weight, device="meta"), requires_grad=False)
        layer.bias = None
        layer.requires_grad_(False)
    return layers


@torch.no_grad()
def _subtract_change(model: nn.Module, layers: Adapter) -> None:
    """Subtract ``scaling · (B A − B0 A0)`` of every layer from its plain weight in ``model``, rounded once."""
    changed = []
    for name, layer in layers.items():
        plain = get_layer(model, name)
        terms = [(-layer.scaling, layer.lora_B, layer.lora_A), (layer.scaling, layer.lora_B0, layer.lora_A0)]
        changed.append((plain, add_low_rank(read_layer(plain)[0], terms)))
    for plain, weight in changed:
        write_matrix(plain, weight)


def _save_as_peft(model: nn.Module, layers: Adapter, folder: str | os.PathLike[str], base_model: str | None) -> None:
    """Write ``layers`` as a stock PEFT LoRA of twice the rank, for any weights of ``model``."""
    config = readable_config(model, {name: LayerFormat.of(layer) for name, layer in layers.items()}, {}, base_model)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter_tensors(layers, {})}
    with staged_files(folder, replaced=is_adapter_file) as stage:
        write_peft(stage, tensors, config)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _size(tensors: Iterable[Tensor]) -> tuple[int, int]:
    """Number of entries and bytes of ``tensors``; shared memory counts once, the meta device not at all."""
    found = {(t.untyped_storage().data_ptr(), t.numel(), t.dtype): t for t in tensors if not t.is_meta}
    return sum(t.numel() for t in found.values()), sum(t.numel() * t.element_size() for t in found.values())
