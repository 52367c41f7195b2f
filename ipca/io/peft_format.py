"""The adapter in PEFT's file format: a LoRA of twice the rank for the original base, which needs no ipca to load.

    lora_A = [A; A0]  (2 rank, in)      lora_B = [B, −B0]  (out, 2 rank)      r = 2 rank      lora_alpha = 2 alpha

so that PEFT's ``lora_alpha / r · lora_B lora_A`` is ``scaling · (B A − B0 A0)``, the change of the weight. Keys and
shapes by kind of layer, for a LoRA of rank ``r``:

| kind | keys below the layer's path | lora_A | lora_B |
|---|---|---|---|
| linear layers | ``lora_A.weight``, ``lora_B.weight`` | ``(r, in)`` | ``(out, r)`` |
| ``"embedding"`` | ``lora_embedding_A``, ``lora_embedding_B`` | ``(r, num)`` | ``(dim, r)`` |
| ``"conv"`` | as linear layers | ``(r, channels, k…)`` | ``(out, r, 1…)`` |
| experts | ``[base_layer.…]lora_A.weight``, below the path of their module | ``(E r, in)`` | ``(out, r E)`` |
| ``"matrix"`` | as experts | ``(r, in)`` | ``(out, r)`` |

A matrix is a parameter ``(out, in)`` that is no layer's weight; only PEFT adapts it. It and experts are PEFT's
``target_parameters``: PEFT wraps their module once for each adapted parameter, the first one innermost, and their keys
contain the wrappers around them. Experts lie one after the other in ``lora_A`` and interleaved in ``lora_B``.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ipca._dtensor import full, gathered, is_sharded, is_writer, plain_type
from ipca.io.peft_reader import Reading, has_peft, misreading_transformers, plain_copy, read_with_peft
from ipca.model.targets import Target, few
from ipca.model.weight_reads import weight_reads
from ipca.nn.layer_kinds import EXPERTS
from ipca.nn.offload import stored_state_dict, stored_tensor
from ipca.nn.window_layer import WindowLayer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
MATRIX = "matrix"
_PARAMETERS = (*EXPERTS, MATRIX)

Part = Literal["A", "B"]
T = TypeVar("T", int, float)


class AdapterContents(NamedTuple):
    """What an adapter file holds of a model: the adapted layers and the fully trained modules, by path."""

    layers: dict[str, WindowLayer]
    modules_to_save: dict[str, nn.Module]


# -- keys and shapes


def factor_keys(name: str, kind: str = "linear", wrappers: int = 0) -> tuple[str, str]:
    """The keys of ``lora_A`` and ``lora_B`` of the layer at the path ``name``, around which lie ``wrappers``."""
    if kind == "embedding":
        return f"{PREFIX}{name}.lora_embedding_A", f"{PREFIX}{name}.lora_embedding_B"
    path = name.rpartition(".")[0] + ".base_layer" * wrappers if kind in _PARAMETERS else name
    return f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"


def wrappers_around(kinds: Mapping[str, str]) -> dict[str, int]:
    """For each layer how many stacks of the same module come after it; ``kinds`` by path, in the model's order."""
    names = list(kinds)
    stacks = [name for name in names if kinds[name] in _PARAMETERS]
    owner = {name: name.rpartition(".")[0] for name in stacks}
    behind = {name: sum(owner[other] == owner[name] for other in stacks[i + 1 :]) for i, name in enumerate(stacks)}
    return {name: behind.get(name, 0) for name in names}


def to_peft(kind: str, A: Tensor, B: Tensor, kernel: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """``A (…, r, in), B (…, out, r)`` in PEFT's shapes; ``kernel (k…)`` is that of a convolution."""
    if kind == "conv":
        return A.reshape(A.shape[0], -1, *kernel), B.reshape(*B.shape, *(1 for _ in kernel))
    if kind in EXPERTS:
        return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    return A, B


def from_peft(kind: str, shape: Sequence[int], lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`to_peft`; ``shape (…, out, in)`` is that of the matrix or the stack, which they fit."""
    if kind in EXPERTS:
        B = lora_B.unflatten(1, (-1, shape[0])).permute(2, 0, 1).contiguous()
        return lora_A.unflatten(0, (shape[0], -1)), B
    return lora_A.flatten(1), lora_B.flatten(1)


def double_factor(part: Part, factor: Tensor, initial: Tensor, experts: int = 1) -> Tensor:
    """``[A; A0]`` or ``[B, −B0]`` in PEFT's shapes, a stack of ``experts`` doubled within each of them."""
    pair = (factor, initial if part == "A" else -initial)
    both = torch.cat([_by_rank(part, each, experts) for each in pair], dim=1)
    axis = 0 if part == "A" else 1
    return both.reshape(*factor.shape[:axis], 2 * factor.shape[axis], *factor.shape[axis + 1 :])


def split_factor(part: Part, doubled: Tensor, experts: int = 1) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`double_factor`: ``A, A0`` or ``B, B0``, each contiguous in memory of its own."""
    axis = 0 if part == "A" else 1
    shape = (*doubled.shape[:axis], doubled.shape[axis] // 2, *doubled.shape[axis + 1 :])
    halves = (half.reshape(shape) for half in _by_rank(part, doubled, experts).chunk(2, dim=1))
    factor, initial = (half.clone(memory_format=torch.contiguous_format) for half in halves)
    return factor, initial if part == "A" else initial.neg_()


def _by_rank(part: Part, tensor: Tensor, experts: int) -> Tensor:
    """A view of one of PEFT's factors whose dimension 1 counts the ranks of each expert."""
    return tensor.reshape(experts, -1, tensor[0].numel()) if part == "A" else tensor.reshape(len(tensor), -1, experts)


# -- what the file holds


@torch.no_grad()
def adapter_tensors(
    layers: Mapping[str, WindowLayer], modules_to_save: Mapping[str, nn.Module], *, doubled: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the adapter file; ``doubled=False`` gives only ``A, B``, for a residual base.

    Sharded factors are gathered, which is a collective; for the rest see :func:`ipca._dtensor.gathered`.
    """
    wrappers = wrappers_around({name: layer.kind for name, layer in layers.items()})
    for name, layer in layers.items():
        kernel, experts = getattr(layer, "kernel_size", ()), math.prod(layer.matrix_shape[:-2])
        A, B = (full(stored_tensor(layer, name)) for name in ("lora_A", "lora_B"))
        A, B = to_peft(layer.kind, A, B, kernel)
        if doubled:
            A0, B0 = (stored_tensor(layer, name) for name in ("lora_A0", "lora_B0"))
            A0, B0 = to_peft(layer.kind, A0, B0, kernel)
            A, B = double_factor("A", A, A0, experts), double_factor("B", B, B0, experts)
        yield from zip(factor_keys(name, layer.kind, wrappers[name]), (A, B), strict=True)
    for name, module in modules_to_save.items():
        for key, value in stored_state_dict(module).items():
            yield f"{PREFIX}{name}.{key}", value


def adapter_state(model: nn.Module, contents: AdapterContents, *, doubled: bool = True) -> dict[str, Tensor]:
    """The tensors of the adapter file on the CPU; for a sharded model a collective, and only rank 0 gets them."""
    return gathered(adapter_tensors(*contents, doubled=doubled), keep=is_writer(model))


def check_finite(contents: AdapterContents, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError where ``tensors``, of :func:`adapter_state`, hold NaN or Inf, which nothing could load."""
    modules = contents.modules_to_save.items()
    buffers = {f"{PREFIX}{name}.{key}" for name, module in modules for key, _ in module.named_buffers()}
    for key, tensor in tensors.items():
        if key not in buffers and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{key.removeprefix(PREFIX)} holds NaN or Inf: nothing was written. Go back to a state of the training "
                "from before, and lower the learning rate."
            )


class LayerFormat(NamedTuple):
    """What the file holds of one layer: its kind, its shape ``(…, out, in)``, and PEFT's rank and ``lora_alpha``.

    ``kernel (k…)`` is that of a convolution.
    """

    kind: str
    shape: tuple[int, ...]
    r: int
    alpha: float
    kernel: tuple[int, ...] = ()

    @classmethod
    def of(cls, layer: WindowLayer, *, doubled: bool = True) -> LayerFormat:
        """The format of an adapted layer, ``doubled`` as in :func:`adapter_tensors`."""
        factor, kernel = 2 if doubled else 1, getattr(layer, "kernel_size", ())
        return cls(layer.kind, layer.matrix_shape, factor * layer.rank, factor * layer.alpha, tuple(kernel))

    @classmethod
    def of_target(cls, target: Target, module: nn.Module, *, doubled: bool = True) -> LayerFormat:
        """The format that the plain layer ``module`` will have once it is adapted as ``target`` says."""
        assert target.kind is not None
        factor, kernel = 2 if doubled else 1, getattr(module, "kernel_size", ())
        return cls(target.kind, target.shape, factor * target.window.rank, factor * target.alpha, tuple(kernel))

    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of ``lora_A`` and ``lora_B``."""
        *experts, out, inner = self.shape
        r = math.prod(experts) * self.r
        ones = tuple(1 for _ in self.kernel)
        return (r, inner // math.prod(self.kernel), *self.kernel), (out, r, *ones)


def adapter_config(
    layers: Mapping[str, LayerFormat],
    modules_to_save: Iterable[str],
    all_names: list[str],
    base_model: str | None,
    *,
    as_parameters: Container[str] = (),
    exclude: Sequence[str] = (),
) -> dict[str, Any]:
    """``adapter_config.json`` for PEFT.

    Args:
        layers: by path, in the model's order.
        modules_to_save: paths of fully trained modules.
        all_names: the paths of all modules of the model.
        as_parameters: layers to name in ``target_parameters``, as the parameters ``weight`` that they are.
        exclude: paths that the names in ``target_modules`` would match too, for ``exclude_modules``.

    Raises:
        ValueError: PEFT has no configuration for such an adapter.
    """
    r = _most_common([layer.r for layer in layers.values()])
    alpha = _most_common([layer.alpha for layer in layers.values()])
    stacks = [name for name, layer in layers.items() if layer.kind in EXPERTS]
    transposed = any(layer.kind == "conv1d" for layer in layers.values())
    _check_stacks(stacks, all_names, transposed)
    written = {name: f"{name}.weight" if name in as_parameters else name for name in layers}
    parameters = [written[name] for name in layers if name in stacks or name in as_parameters]
    modules = [name for name in layers if written[name] not in parameters]
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "init_lora_weights": True,
        "fan_in_fan_out": transposed,
        "target_modules": _target_modules(modules, all_names),
        "modules_to_save": list(modules_to_save) or None,
        "rank_pattern": _pattern({written[name]: layer.r for name, layer in layers.items()}, r),
        "alpha_pattern": _pattern({written[name]: _number(layer.alpha) for name, layer in layers.items()}, alpha),
    }
    # Older versions of PEFT refuse a field that they do not know, even where it is null.
    return config | {
        name: value for name, value in (("target_parameters", parameters), ("exclude_modules", list(exclude))) if value
    }


def _check_stacks(stacks: list[str], all_names: list[str], transposed: bool) -> None:
    """Raise where PEFT, which matches a stack by the end of its path, would take others too, or takes none."""
    if stacks and transposed:
        raise ValueError(f"PEFT cannot have {stacks[0]} in one adapter with a Conv1D layer; adapt one of them.")
    for stack in stacks:
        owner = stack.rpartition(".")[0]
        other = next((name for name in all_names if name.endswith(f".{owner}")), None)
        if other is not None:
            raise ValueError(f"PEFT would take the weights of {other} for those of {stack}; rename one of them.")


def _target_modules(names: list[str], all_names: list[str]) -> list[str] | str:
    """The ends of the paths, or a regular expression where even a whole path is the end of another module's too."""
    ends = list(dict.fromkeys(shortest_ends(names, all_names).values()))
    plain = [end for end in ends if end is not None]
    return plain if len(plain) == len(ends) else "|".join(re.escape(name) for name in names)


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """``{pattern: value}`` for the layers with another value than ``default``.

    Every PEFT finds an end of a path, and a whole path; an anchored expression only newer ones.
    """
    found = {}
    for value in dict.fromkeys(values.values()):
        names = [name for name, each in values.items() if each == value != default]
        ends = shortest_ends(names, list(values))
        found.update({_plain(end) or f"^{re.escape(name)}": value for name, end in ends.items()})
    return found


def _plain(end: str | None) -> str:
    """``end`` where it is its own regular expression, but for its dots."""
    return end if end and re.fullmatch(r"[\w.-]+", end) else ""


def shortest_ends(names: Iterable[str], all_names: Iterable[str]) -> dict[str, str | None]:
    """For each of the paths ``names`` its shortest end that no path of ``all_names`` but those in ``names`` has.

    None where the whole path is the end of another one. Ends outlast a module that is renamed or moved above them.
    """
    names = list(names)
    other = Counter(end for name in {*all_names} - {*names} for end in _ends(name))
    return {name: next((end for end in _ends(name) if not other[end]), None) for name in names}


def _ends(path: str) -> Iterator[str]:
    """The ends of a path that begin with a name, the shortest first."""
    parts = path.split(".")
    return (".".join(parts[i:]) for i in reversed(range(len(parts))))


def _most_common(values: list[T]) -> T:
    """The most common of ``values``, of several the largest."""
    return max(Counter(sorted(values, reverse=True)).items(), key=lambda item: item[1])[0]


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def readable_config(
    model: nn.Module,
    layers: Mapping[str, LayerFormat],
    modules_to_save: Mapping[str, nn.Module],
    base_model: str | None = None,
    *,
    others: bool = False,
) -> dict[str, Any]:
    """``adapter_config.json`` from which PEFT builds the layers of the adapter and no others, as PEFT itself shows.

    PEFT and transformers rewrite some names: in a mixture of experts, ``gate_proj`` in ``target_modules`` is the
    experts' parameter and no longer a dense layer of that name. Such a layer is named in ``target_parameters``. Where
    PEFT is not installed nothing is checked, which a warning says for models of transformers.

    Args:
        model: with or without the adapter, on any device.
        layers, modules_to_save: what the file holds, by path.
        base_model: PEFT's ``base_model_name_or_path``; default ``model.name_or_path``.
        others: the files are for programs without ipca, so that one that PEFT refuses is of no use.

    Raises:
        ValueError: PEFT would read another adapter, or (``others``) none; the message names the layers.
    """
    base_model = base_model if base_model is not None else getattr(model, "name_or_path", None) or None
    names, cls = [name for name, _ in model.named_modules()], plain_type(model)
    from_transformers = cls.__module__.startswith("transformers.")
    # what peft.AutoPeftModel loads the base with
    auto = {"auto_mapping": {"base_model_class": cls.__name__, "parent_library": cls.__module__}}

    def config_of(chosen: Mapping[str, LayerFormat], saved: Iterable[str], **spelling: Any) -> dict[str, Any]:
        return adapter_config(chosen, saved, names, base_model, **spelling) | (auto if from_transformers else {})

    old = misreading_transformers()
    if from_transformers and old and any(layer.kind in EXPERTS for layer in layers.values()):
        warnings.warn(
            f"transformers {old} misreads stacks of experts in model.load_adapter, without a message: load the folder "
            "with peft.PeftModel.from_pretrained or ipca.load_adapter, or update transformers to 5.7.",
            RuntimeWarning,
            stacklevel=3,
        )
    as_parameters: list[str] = []
    exclude: list[str] = []
    while True:
        config = config_of(layers, modules_to_save, as_parameters=as_parameters, exclude=exclude)
        if not has_peft():
            if from_transformers:
                warnings.warn(_UNCHECKED, stacklevel=2)
            return config
        reading = read_with_peft(plain_copy(model), config, *_expected(layers, modules_to_save))
        if not reading:
            return config
        lost, more = _lost(model, layers, reading, config_of), _beside(layers, reading)
        wrong = [name for name in lost if layers[name].kind == "linear" and name not in as_parameters]
        if not wrong and not set(more) - set(exclude):
            _report(lost, more, reading.refusal, others)
            return config
        as_parameters += wrong
        exclude += [] if wrong else [name for name in more if name not in exclude]


_UNCHECKED = (
    "PEFT is not installed, so that it was not checked what PEFT makes of this adapter; run pip install "
    "'ipca-lora[peft]', or load the folder with ipca.load_adapter only."
)
NOT_CALLED = (
    "the model reads the weight and does not call the layer, so that PEFT and servers, which change a layer's output, "
    "leave its adapter out"
)
_MAY_READ = (
    "the model calls the layer or reads its weight, by device and settings; where it reads, W_res alone is wrong"
)
_INSTEAD = "exclude them, or call ipca.unload(model) and save the merged model"


def _expected(
    layers: Mapping[str, LayerFormat], modules_to_save: Mapping[str, nn.Module]
) -> tuple[dict[str, tuple[int, ...]], dict[str, float]]:
    """The shape of every tensor in the file, and PEFT's scaling of every layer by the key of its ``lora_A``."""
    wrappers = wrappers_around({name: layer.kind for name, layer in layers.items()})
    shapes: dict[str, tuple[int, ...]] = {}
    scalings = {}
    for name, layer in layers.items():
        keys = factor_keys(name, layer.kind, wrappers[name])
        shapes.update(zip(keys, layer.factor_shapes(), strict=True))
        scalings[keys[0]] = layer.alpha / layer.r
    for name, module in modules_to_save.items():
        shapes.update((f"{PREFIX}{name}.{key}", tuple(value.shape)) for key, value in module.state_dict().items())
    return shapes, scalings


def _lost(
    model: nn.Module, layers: Mapping[str, LayerFormat], reading: Reading, config_of: Callable[..., dict[str, Any]]
) -> list[str]:
    """The layers that PEFT does not build as they are; where it refuses all of them, those that it refuses alone."""
    if not reading.refusal:
        wrappers = wrappers_around({name: layer.kind for name, layer in layers.items()})
        keys = {name: factor_keys(name, layer.kind, wrappers[name]) for name, layer in layers.items()}
        wrong = {*reading.ignored, *reading.scaled}
        return [name for name in layers if wrong.intersection(keys[name])]
    groups: dict[str, dict[str, LayerFormat]] = {}
    for name, layer in layers.items():
        groups.setdefault(name.rpartition(".")[2], {})[name] = layer
    lost: list[str] = []
    for group in groups.values():
        if read_with_peft(plain_copy(model), config_of(group, ()), *_expected(group, {})):
            lost += group
    return lost


def _beside(layers: Mapping[str, LayerFormat], reading: Reading) -> list[str]:
    """The modules that PEFT would adapt beside the layers."""
    found = dict.fromkeys(key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in reading.missing)
    return [name for name in found if name not in layers]


def _report(lost: list[str], more: list[str], refusal: str, others: bool) -> None:
    """Raise ValueError, or warn of a folder that PEFT refuses and only ipca loads."""
    if not refusal:
        wrong = [f"leave out {few(lost)}"] * bool(lost) + [f"adapt {few(more)} too"] * bool(more)
        raise ValueError(f"PEFT would read another adapter than this one: it would {' and '.join(wrong)}; {_INSTEAD}.")
    text = f"PEFT cannot load {few(lost) if lost else 'this adapter'} ({refusal})"
    if others:
        raise ValueError(f"{text}; {_INSTEAD}.")
    warnings.warn(f"{text}. ipca.load_adapter and ipca merge read the folder; for PEFT {_INSTEAD}.", stacklevel=2)


@torch.no_grad()
def bypassed_words(model: nn.Module, layers: Mapping[str, WindowLayer], *, residual: bool = False) -> str:
    """Words for layers that the model does not call, whose adapter readers other than ipca leave out; empty for none.

    Before training that changes nothing on the original base. ``residual``: the base is to hold ``W_res``, which is
    wrong without the adapter from the start.
    """
    in_code = weight_reads(model, layers).uncalled
    found = [n for n, layer in layers.items() if layer.bypassed or (n in in_code and not layer.was_called)]
    found = [name for name in found if residual or not _unchanged(layers[name])]
    return f"{few(found)}: {NOT_CALLED}; {_INSTEAD}" if found else ""


def warn_of_reads(model: nn.Module, names: Collection[str], instead: str) -> None:
    """Warn of the layers ``names`` of which the residual base may be read alone; ``instead`` is what to do."""
    found = weight_reads(model, names).also_called
    if found:
        warnings.warn(f"{few(found)}: {_MAY_READ}; {instead}.", stacklevel=3)


def _unchanged(layer: WindowLayer) -> bool:
    """Whether the factors are the initial ones."""
    pairs = ((layer.lora_A, layer.lora_A0), (layer.lora_B, layer.lora_B0))
    return all(not is_sharded(factor) and torch.equal(factor, initial) for factor, initial in pairs)


# -- files


def write_peft(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write PEFT's two files into ``folder``, which exists.

    Args:
        tensors: those of :func:`adapter_state`.
        config: of :func:`readable_config`.
    """
    save_file(_unshared(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    write_config(folder, config)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write PEFT's configuration of an adapter."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def formats(contents: AdapterContents, *, doubled: bool = True) -> dict[str, LayerFormat]:
    """The formats of the adapted layers, ``doubled`` as in :func:`adapter_tensors`."""
    return {name: LayerFormat.of(layer, doubled=doubled) for name, layer in contents.layers.items()}


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors``, with copies of those that share memory with an earlier one, which safetensors refuses."""
    found: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found
