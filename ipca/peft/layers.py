"""PEFT's LoRA layers with a window: their base class and LoRA variant, linear, embedding and convolution layers."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import layer as lora
from peft.tuners.lora.layer import LoraVariant
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from ipca._hashing import tensor_sha256
from ipca.io.adapter_folder import SavedLayer, other_base, svd_record
from ipca.io.peft_format import to_peft
from ipca.nn.initialization import InitialFactors, count_null, initial_factors
from ipca.nn.offload import execution_device, is_offloaded, stored_tensor
from ipca.ops.linear import pc_linear_of_layer
from ipca.ops.op import Layer, without_autocast
from ipca.ops.pair import balanced_pair, one_pair
from ipca.peft.factors import (
    LOST,
    check_handed_out,
    has_initial,
    initial_factor,
    initial_name,
    misfit,
    move_pair,
    register_initial,
    remove_initial,
)
from ipca.peft.merging import ExactUnmerge
from ipca.peft.records import LayerRecords

Pair = tuple[Tensor, Tensor, Tensor, Tensor]
"""``A, B, A0, B0`` as PEFT stores them."""

_TERMS = (
    ("lower `start` or `rank`", "lower window or r, for one layer in window_pattern or rank_pattern"),
    ("lower `rank`", "lower r"),
    ("lower alpha", "lower lora_alpha"),
    ("choose another adapter_dtype", "leave autocast_adapter_dtype on"),
)


class Start(NamedTuple):
    """What an adapter of a layer was asked for, and the record of what it started from.

    Attributes:
        records: of its configuration.
        asked: the fields of the configuration on which ``A0, B0`` and the record depend.
        record: what ``ipca.json`` holds of the layer; None where that is not known.
    """

    records: LayerRecords
    asked: tuple[Any, ...]
    record: SavedLayer | None


class WindowLora(ExactUnmerge):
    """Base class of PEFT's LoRA layers that can hold adapters of a PCConfig; other adapters are left to PEFT.

    The base weight counts as a matrix ``(out, in)``, ``A, A0`` as ``(r, in)``, ``B, B0`` as ``(out, r)``, in whatever
    shape PEFT stores them.
    """

    kind = "linear"
    was_called = was_read = False
    frozen_peft_weight_names: dict[str, tuple[str, ...]]
    starts: dict[str, Start]

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, target_name: str = "", **kwargs: Any) -> None:
        self.path, self.starts = target_name, {}
        super().__init__(base_layer, adapter_name, **kwargs)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, in the place of one of that name, whose window PEFT would keep beside the new factors."""
        for owner, name in self.owners(adapter_name) if self.holds(adapter_name) else ():
            remove_initial(owner, name)
        self.starts.pop(adapter_name, None)
        self.lora_variant.pop(adapter_name, None)
        self.frozen_peft_weight_names.pop(adapter_name, None)
        super().update_layer(adapter_name, *args, **kwargs)

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        """The variant of an adapter, which PEFT asks for; PEFT's own layers refuse a config with a window."""
        if getattr(config, "window", None) is None:
            return super().resolve_lora_variant(config=config, **kwargs)
        return WindowVariant()

    @property
    def weight(self) -> Tensor:
        """The base weight, for code that reads it without calling the layer, which then leaves the adapter out."""
        if not torch.compiler.is_compiling():
            self.was_read = True
        return super().weight

    def note_call(self) -> None:
        """Remember that the layer computes its adapter when the model runs; of compiled models nothing is known."""
        if not torch.compiler.is_compiling() and not self.was_called:
            self.was_called = True

    def base_parameter(self) -> Tensor:
        """The weight as the base layer holds it, or as accelerate keeps it for the layer."""
        return stored_tensor(self.get_base_layer(), "weight")

    def base_matrix(self) -> Tensor:
        """The base weight as ``(out, in)``, a float tensor."""
        return self.base_parameter().detach()

    def base_sha256(self) -> str:
        """The hash by which an adapter recognizes its base weight."""
        return tensor_sha256(self.base_matrix())

    def holds(self, adapter: str) -> bool:
        """Whether the layer has an adapter of that name."""
        return adapter in self.lora_A or adapter in self.lora_embedding_A

    def owners(self, adapter: str) -> tuple[tuple[nn.Module, str], tuple[nn.Module, str]]:
        """The modules of PEFT that hold ``A`` and ``B``, and the parameters' names there."""
        own: Any = self._modules  # where an attribute would be looked up after a failed search
        return (own["lora_A"][adapter], "weight"), (own["lora_B"][adapter], "weight")

    def frozen_layers(self, train: str) -> tuple[str, ...]:
        """The names of PEFT's dictionaries of factors that are frozen where only ``train`` trains."""
        other = "B" if train == "A" else "A"
        return f"lora_{other}", f"lora_embedding_{other}"

    def stored(self, initial: InitialFactors, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """``A0, B0`` in the shapes, the dtype and on the device of ``A, B``."""
        return initial.A0.to(A), initial.B0.to(B)

    def init_adapter(self, adapter: str, config: Any) -> None:
        """Have a new adapter start from the initial factors that the records of its configuration hold for this layer.

        Where they hold none, it takes those of another adapter of the same configuration, as TRL's ``"ref"``, to which
        those of ``"default"`` are copied. Where there is none either, the layer waits, and
        :func:`ipca.peft.preparation.start` decomposes the weights of all waiting layers once PEFT has made these.

        Raises:
            ValueError: the records belong to another base weight; the message begins with the layer's path.
        """
        (in_A, name_A), (in_B, name_B) = self.owners(adapter)
        A, B, records = in_A.get_parameter(name_A), in_B.get_parameter(name_B), config.records
        if config.train != "both":  # which PEFT asks for whenever it sets what trains
            frozen = self.frozen_layers(config.train)
            self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter: frozen}
        if A.is_meta or self.base_parameter().is_meta:  # low_cpu_mem_usage: a file is about to be loaded
            if self._known_base(records) and not self.base_parameter().is_meta:
                self._check_base(records, self.base_sha256())
            A0, B0 = torch.empty_like(A, device="meta"), torch.empty_like(B, device="meta")
            self._register(adapter, config, A0, B0)
        elif self.path in records.initial:
            self.set_initial(adapter, config)
        elif (twin := self._twin(adapter, config)) is not None:
            self._start_as(adapter, config, twin)
        else:
            records.waiting.append(self)

    def set_initial(self, adapter: str, config: Any, found: InitialFactors | None = None) -> None:
        """Set ``A = A0`` and ``B = B0``, the window of the base weight, and keep ``A0, B0`` beside them.

        Args:
            adapter: its name; PEFT has made its ``A, B``.
            config: its :class:`ipca.peft.PCConfig`, whose records give initial factors that are known already, and
                take the record that is saved.
            found: the initial factors of this base weight; default those in the records, or decomposed here.

        Raises:
            TypeError, ValueError, RuntimeError: as :func:`ipca.window_svd`, or the initial factors in the records
                belong to another base weight; the message begins with the layer's path.
        """
        (in_A, name_A), (in_B, name_B) = self.owners(adapter)
        A, B = in_A.get_parameter(name_A), in_B.get_parameter(name_B)
        with gather_params_ctx(self.base_parameter()):
            initial = self._initial_factors(adapter, config, A.dtype, found)
            A0, B0 = self.stored(initial, A.detach(), B.detach())
        self._set_start(adapter, config, A0, B0)

    def _twin(self, adapter: str, config: Any) -> str | None:
        """The name of another adapter that holds what this one is asked for, of the same configuration; or None."""
        asked = self._asked(adapter, config)
        for name, start in self.starts.items():
            initial = [initial_factor(*owner) for owner in self.owners(name)]
            there = all(factor is not None and not factor.is_meta for factor in initial)
            if start.records is config.records and start.asked == asked and there:
                return name
        return None

    def _start_as(self, adapter: str, config: Any, twin: str) -> None:
        """Start from ``A0, B0`` of the adapter ``twin``, with its record, in the dtype that they have there."""
        record, initial = self.starts[twin].record, []
        if record is not None:
            config.records.saved[self.path] = record
        for (owner, name), other in zip(self.owners(adapter), self.owners(twin), strict=True):
            initial.append(other[0].get_buffer(initial_name(other[1])).detach().clone())
            factor = owner.get_parameter(name)
            same = nn.Parameter(factor.detach().to(initial[-1]), requires_grad=factor.requires_grad)
            owner.register_parameter(name, same)
        self._set_start(adapter, config, *initial)

    def _set_start(self, adapter: str, config: Any, A0: Tensor, B0: Tensor) -> None:
        if config.init_lora_weights:
            with torch.no_grad():
                for (owner, name), initial in zip(self.owners(adapter), (A0, B0), strict=True):
                    owner.get_parameter(name).copy_(initial)
        self._register(adapter, config, A0, B0)

    def _asked(self, adapter: str, config: Any) -> tuple[Any, ...]:
        window = config.window_of(self.path, self.r[adapter])
        return window, self.scaling[adapter], config.tol, config.train, config.magnitude, config.lora_dropout

    def _register(self, adapter: str, config: Any, A0: Tensor, B0: Tensor) -> None:
        (in_A, name_A), (in_B, name_B) = self.owners(adapter)
        records: LayerRecords = config.records
        # two models may share a config: the one that is saved puts its own record back as its state dict is made
        saved = records.saved
        self.starts[adapter] = Start(records, self._asked(adapter, config), saved.get(self.path))
        on_save = partial(operator.setitem, saved, self.path, saved[self.path]) if self.path in saved else None
        experts = getattr(self, "num_experts", 1)
        on_other = partial(records.replace, self.path)
        options: Any = {"experts": experts, "on_save": on_save, "on_write": partial(records.warn_written, self.path)}
        register_initial(in_A, name_A, "A", A0, on_other=on_other, **options)
        register_initial(in_B, name_B, "B", B0, **options)

    def _initial_factors(
        self, adapter: str, config: Any, dtype: torch.dtype, found: InitialFactors | None
    ) -> InitialFactors:
        """The layer's ``A0, B0``: ``found``, from the records, or decomposed; its record to save is made as well."""
        records: LayerRecords = config.records
        rank, scaling = self.r[adapter], self.scaling[adapter]
        digest = self.base_sha256() if found is None else found.base_sha256
        self._check_base(records, digest)
        initial, magnitude = found or records.initial.pop(self.path, None), config.magnitude
        if records.loaded and initial is not None and found is None:
            magnitude = records.saved[self.path].magnitude
        if initial is None:
            matrix, window = self.base_matrix(), config.window_of(self.path, rank)
            check_rank(self.path, rank, matrix.shape)
            try:
                options = {"scaling": scaling, "form": "intact", "adapter_dtype": dtype, "tol": config.tol}
                initial = initial_factors(matrix, window, magnitude=magnitude, digest=digest, **options)
            except (TypeError, ValueError, RuntimeError) as error:
                raise type(error)(f"{self.path}: {in_peft_terms(error)}") from None
        records.saved[self.path] = SavedLayer(
            kind=self.kind,
            shape=(*initial.B0.shape[:-1], initial.A0.shape[-1]),
            start=initial.window.index,
            rank=rank,
            alpha=scaling * rank,
            form="intact",
            dropout=0.0 if self.kind == "embedding" else config.lora_dropout,  # PEFT drops nothing of indices
            base_sha256=digest,
            svd=None if initial.svd is None else svd_record(initial.svd),
            basis=initial.window.basis,
            train=config.train,
            magnitude=magnitude,
        )
        return initial

    def _known_base(self, records: LayerRecords) -> str | None:
        """The hash of the base weight that the layer's records belong to; None or empty where that is not known."""
        initial = records.initial.get(self.path)
        return records.base_sha256.get(self.path) or (None if initial is None else initial.base_sha256)

    def _check_base(self, records: LayerRecords, digest: str) -> None:
        known = self._known_base(records)
        if known and known != digest:
            raise ValueError(other_base(self.path, known, digest) + ".")

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move ``A, B, A0, B0`` without PEFT's cast to the base's dtype after loading with ``low_cpu_mem_usage``.

        Beside an offloaded weight they go to the device that it is computed on, not to the meta device.
        """
        if is_offloaded(self.get_base_layer()):
            device = device or execution_device(self.get_base_layer())
        owners = self.owners(adapter_name) if self.holds(adapter_name) else ()
        if owners and all(has_initial(owner, name) for owner, name in owners):
            for owner, name in owners:
                move_pair(owner, name, device or self.base_parameter().device)
        else:
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete ``A0, B0`` too, which PEFT would leave in an embedding's dictionaries."""
        owners = self.owners(adapter_name) if self.holds(adapter_name) else ()
        super().delete_adapter(adapter_name)
        self.starts.pop(adapter_name, None)
        for owner, name in owners:
            remove_initial(owner, name)

    def pairs(self, adapter: str) -> Pair | None:
        """``A, B, A0, B0`` of an adapter with initial factors, else None.

        Raises:
            RuntimeError: ``A, B`` do not belong to ``A0, B0``, or hold no values yet; see :func:`misfit`.
        """
        (in_A, name_A), (in_B, name_B) = self.owners(adapter)
        if not torch.compiler.is_compiling():
            check_handed_out(in_A, name_A)
        A0, B0 = initial_factor(in_A, name_A), initial_factor(in_B, name_B)
        if A0 is None or B0 is None:
            window = isinstance(self.lora_variant.get(adapter), WindowVariant)
            if window and not (has_initial(in_A, name_A) and has_initial(in_B, name_B)):
                raise RuntimeError(f"{self.path}: the adapter {adapter!r} cannot be computed: {LOST}.")
            return None
        A, B = stored_tensor(in_A, name_A), stored_tensor(in_B, name_B)
        why = misfit(A, B, empty=A.is_meta and not self.base_parameter().is_meta)
        if why:
            raise RuntimeError(f"{self.path}: the adapter {adapter!r} cannot be computed: {why}.")
        return A, B, A0, B0

    def change(self, adapter: str) -> Tensor:
        """``scaling · (B A − B0 A0)`` in the layout of the base weight, float32 or wider."""
        pair = self.pairs(adapter)
        assert pair is not None
        wide = torch.promote_types(pair[0].dtype, torch.float32)
        A, B, A0, B0 = (tensor.to(wide) for tensor in pair)
        with without_autocast(A):
            return self.in_layout(self.scaling[adapter] * (self.product(B, A) - self.product(B0, A0)))

    def product(self, B: Tensor, A: Tensor) -> Tensor:
        """``B A (out, in)`` of factors as PEFT stores them."""
        return B.flatten(1) @ A.flatten(1)

    def in_layout(self, matrix: Tensor) -> Tensor:
        """A matrix ``(out, in)`` in the layout of the base weight."""
        return matrix

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change of the base weight, which PEFT asks for when it merges."""
        if self.pairs(adapter) is None:
            return super().get_delta_weight(adapter)
        owner, name = self.owners(adapter)[1]
        return self.change(adapter).to(owner.get_parameter(name).dtype)

    def low_rank(self, adapter: str, x: Tensor) -> Tensor:
        """``scaling · (z Aᵀ Bᵀ − z A0ᵀ B0ᵀ)``, exactly 0 while ``A = A0`` and ``B = B0``.

        It is one product with ``D, E`` of ``ipca.ops.pair``, which keeps the digits of a small change in 16 bits. Where
        others watch or replace the modules of the factors, these are called, and the difference is taken in the
        factors' dtype.
        """
        self.note_call()
        z, lora_A, lora_B = self.lora_dropout[adapter](x), self.lora_A[adapter], self.lora_B[adapter]
        pair, scaling = self.pairs(adapter), self.scaling[adapter]
        if pair is None:
            return lora_B(lora_A(z)) * scaling
        known = type(lora_A) in _FACTORS and type(lora_B) in _FACTORS
        if known and not (is_watched(lora_A) or is_watched(lora_B) or _has_any_global_hook()):
            A, B, A0, B0, scaling = balanced_pair(*pair, scaling, z)
            D, E = one_pair(A, B, A0, B0)
            return self.apply_factor(lora_B, self.apply_factor(lora_A, z, D), E) * scaling
        A0, B0 = pair[2].to(pair[0].dtype), pair[3].to(pair[1].dtype)
        with without_autocast(z):
            z = z.to(A0.dtype)
            return (lora_B(lora_A(z)) - self.apply_factor(lora_B, self.apply_factor(lora_A, z, A0), B0)) * scaling

    def apply_factor(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """``module(x)`` with another weight."""
        return F.linear(x, weight)


class WindowVariant(LoraVariant):
    """The LoRA variant that PEFT asks about an adapter of a PCConfig: initialize, compute, merge.

    ``y = base(x) + scaling · (z Aᵀ Bᵀ − z A0ᵀ B0ᵀ)``, whose last term is exactly 0 while ``A = A0`` and ``B = B0``.
    """

    @staticmethod
    def init(module: WindowLora, adapter_name: str, config: LoraConfig, **_: Any) -> None:
        module.init_adapter(adapter_name, config)

    @staticmethod
    def forward(module: WindowLora, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        return result + module.low_rank(active_adapter, x)

    @staticmethod
    @torch.no_grad()
    def merge_safe(module: WindowLora, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return _added(orig_weight, module.change(active_adapter))

    @staticmethod
    @torch.no_grad()
    def merge_unsafe(module: WindowLora, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.copy_(_added(orig_weight, module.change(active_adapter)))

    @staticmethod
    @torch.no_grad()
    def unmerge(module: WindowLora, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return _added(orig_weight, -module.change(active_adapter))


def _added(weight: Tensor, change: Tensor) -> Tensor:
    """``weight + change``, rounded once to the dtype of ``weight``."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + change.to(weight.device, wide)).to(weight.dtype)


def null_components(model: nn.Module, adapter: str) -> dict[str, tuple[int, int]]:
    """:func:`ipca.nn.initialization.count_null` of each layer of an adapter that has initial factors, by path."""
    found = {}
    for layer in model.modules():
        if isinstance(layer, WindowLora) and layer.holds(adapter):
            B0 = initial_factor(*layer.owners(adapter)[1])
            if B0 is not None and not B0.is_meta:
                found[layer.path] = count_null(B0.flatten(1))
    return found


def check_rank(path: str, rank: int, shape: Sequence[int]) -> None:
    """Raise ValueError where the base weight ``(…, out, in)`` of a layer has fewer than ``rank`` singular values."""
    d = min(shape[-2:])
    if rank > d:
        raise ValueError(
            f"{path}: r={rank} needs {rank} singular values, but there are only {d}; lower r, give the layer another "
            "rank in rank_pattern, or exclude it."
        )


def in_peft_terms(error: Exception) -> str:
    """The message of an error from below, with the names that a PCConfig has for what it advises to change."""
    text = str(error)
    for ours, theirs in _TERMS:
        text = text.replace(ours, theirs)
    return text


class WindowLinear(WindowLora, lora.Linear):
    """A base of type ``nn.Linear`` or transformers' ``Conv1D``."""

    def base_matrix(self) -> Tensor:
        return self.in_layout(self.base_parameter().detach())

    def in_layout(self, matrix: Tensor) -> Tensor:
        return matrix.mT if self.fan_in_fan_out else matrix

    @property
    def kind(self) -> str:
        return "conv1d" if self.fan_in_fan_out else "linear"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        fused = None if args or kwargs else self._fused(x)
        if fused is None:
            return super().forward(x, *args, **kwargs)
        self.note_call()
        return pc_linear_of_layer(x, *fused)

    def _fused(self, x: Tensor) -> tuple[Layer, float] | None:
        """The tensors and the dropout of the one op that computes what PEFT's forward would; None where none does.

        It takes one active adapter, and nothing that others have attached to the base layer or to the factors may be
        left out. Modules are looked up in dictionaries: by attribute it takes as long as the products of a small layer.
        """
        own: Any = self._modules
        lora_A = own["lora_A"]
        active = self._active_adapter
        names = [name for name in ((active,) if isinstance(active, str) else active) if name in lora_A._modules]
        if self._disable_adapters or self.merged_adapters or len(names) != 1:
            return None
        name, base = names[0], own["base_layer"]
        pair = self.pairs(name)
        if pair is None:
            return None
        A, B, A0, B0 = pair
        if not A.device == B.device == A0.device == B0.device == x.device:
            return None
        dropout = own["lora_dropout"]._modules[name]
        called = (base, lora_A._modules[name], own["lora_B"]._modules[name], dropout)
        known = all(type(module) in types for module, types in zip(called, _FUSED, strict=True))
        known = known and type(base).forward is _FORWARDS[type(base)]
        weight = base._parameters.get("weight") if known else None
        if type(weight) is not nn.Parameter or any(map(is_watched, called)) or _has_any_global_hook():
            return None
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            return None
        p = vars(dropout).get("p", 0.0) if dropout.training else 0.0
        return Layer(self.in_layout(weight), A, B, base._parameters["bias"], A0, B0, self.scaling[name]), p


_FACTORS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Types of ``lora_A`` and ``lora_B`` whose product is that of their weights."""
_FUSED = (nn.Linear, Conv1D), (nn.Linear,), (nn.Linear,), (nn.Dropout, nn.Identity)
"""Types of the base, of ``lora_A``, ``lora_B`` and ``lora_dropout`` that the op computes; subclasses may differ."""


_FORWARDS: dict[type[nn.Module], Any] = {base: base.forward for base in _FUSED[0]}
"""What the op computes in their place, unless somebody has replaced it on the class."""


def is_watched(module: Any) -> bool:
    """Whether hooks, or a ``forward`` of the instance, run when ``module`` is called."""
    own = vars(module)
    before, after = own["_forward_pre_hooks"], own["_forward_hooks"]
    return bool("forward" in own or before or after or own["_backward_hooks"] or own["_backward_pre_hooks"])


class WindowEmbedding(WindowLora, lora.Embedding):
    """A base of type ``nn.Embedding``: ``out`` is the embedding's dimension, ``in`` the number of embeddings."""

    kind = "embedding"

    def base_matrix(self) -> Tensor:
        return self.base_parameter().detach().mT

    def in_layout(self, matrix: Tensor) -> Tensor:
        return matrix.mT

    def owners(self, adapter: str) -> tuple[tuple[nn.Module, str], tuple[nn.Module, str]]:
        return (self.lora_embedding_A, adapter), (self.lora_embedding_B, adapter)

    def low_rank(self, adapter: str, x: Tensor) -> Tensor:
        """As for the class; ``x`` holds indices."""
        self.note_call()
        pair = self.pairs(adapter)
        A, B = (self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]) if pair is None else pair[:2]
        A, B = A.to(x.device), B.to(x.device)  # which accelerate may keep elsewhere
        ids = x.reshape(-1)
        D, E = self._embed(ids, A.T).T, B  # (r, M): the rows that are looked up alone
        if pair is not None:
            D, E = one_pair(D, B, self._embed(ids, pair[2].T).T, pair[3])
        y = (D.T @ E.T).view(*x.shape, len(E))
        scale = self._get_embed_scale()
        return y * self.scaling[adapter] if scale is None else y * self.scaling[adapter] * scale.to(y.dtype)

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """A batch of rows for several adapters; PEFT's own asks no variant for embeddings."""
        result = self.base_layer(x, *args, **kwargs)
        for adapter in sorted(set(adapter_names) & set(self.lora_embedding_A)):
            rows = [row for row, name in enumerate(adapter_names) if name == adapter]
            result[rows] += self.low_rank(adapter, x[rows]).to(result.dtype)
        return result


class _WindowConv(WindowLora):
    """A convolution: ``in`` is (channels · kernel), as PEFT flattens it."""

    kind = "conv"

    def base_matrix(self) -> Tensor:
        return self.base_parameter().detach().flatten(1)

    def stored(self, initial: InitialFactors, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        A0, B0 = to_peft(self.kind, initial.A0, initial.B0, self.base_parameter().shape[2:])
        return A0.to(A), B0.to(B)

    def in_layout(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.base_parameter().shape)

    def apply_factor(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        return module._conv_forward(x, weight, None)  # type: ignore[operator]


class WindowConv1d(_WindowConv, lora.Conv1d):
    """A base of type ``nn.Conv1d``."""


class WindowConv2d(_WindowConv, lora.Conv2d):
    """A base of type ``nn.Conv2d``."""


class WindowConv3d(_WindowConv, lora.Conv3d):
    """A base of type ``nn.Conv3d``."""
