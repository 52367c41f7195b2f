"""Calibration: the use that inputs make of each component of a weight, and windows that are found from inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from ipca.model.batches import arguments_of, as_batches, evaluating, inner_model, run_batch
from ipca.model.decompose import UnquantizedWeights, decompose_targets, naming, source_matrix, split_window
from ipca.model.settings import AdapterSettings
from ipca.model.targets import Target, find_targets
from ipca.nn.initialization import InitialFactors
from ipca.nn.layer_kinds import LINEAR, layer_kind
from ipca.nn.quantization import quantization_kind
from ipca.nn.registry import get_layer
from ipca.svd import SpectralCache, WindowSVD
from ipca.svd.cache import cached_window_svd
from ipca.svd.decompose import singular_values
from ipca.window import Window

AUTO = "auto"
_BUDGET = 2**32
"""Bytes of second moments held at a time; the layers beyond it take another pass over the batches."""


@dataclass(frozen=True, eq=False)
class LayerSensitivity:
    """Energy and sensitivity of the components of one layer's weight ``W = U diag(S) Vh (out, in)`` on some inputs.

    Attributes:
        shape: ``(out, in)``; ``d = min(out, in)``.
        S: the singular values ``(d,)``, descending, float64, on the CPU as the others.
        energy: ``(d,)``, the mean of ``(v_iᵀ x)²`` over the layer's inputs ``x``.
    """

    shape: tuple[int, int]
    S: Tensor
    energy: Tensor

    @property
    def sensitivity(self) -> Tensor:
        """``S_i · energy_i (d,)``: the mean square change of the output for a step of length 1 in ``B``.

        A window trains ``B0_i A0_i = (√S_i u_i) (√S_i v_iᵀ)``. A step ``δ`` in column ``i`` of ``B`` changes the output
        by ``δ √S_i v_iᵀ x``, whose mean square is ``‖δ‖² S_i energy_i`` (at ``scaling = 1``; else a constant factor).
        To first order in ``σ_i`` itself, a relative change ``ε`` has the mean square ``ε² S_i² energy_i``.
        """
        return self.S * self.energy

    def quietest(self, rank: int) -> Window:
        """The window of ``rank`` components with the smallest sum of :attr:`sensitivity`; of equal ones the first.

        Raises:
            ValueError: ``rank`` is above ``d``.
        """
        Window(0, rank).resolve(len(self.S))
        sums = self.sensitivity.unfold(0, rank, 1).sum(-1)
        return Window(int((sums == sums.min()).nonzero()[0]), rank)


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    targets: str | Iterable[str] = "all-linear",
    exclude: str | Iterable[str] = (),
    progress: bool = True,
) -> dict[str, LayerSensitivity]:
    """The :class:`LayerSensitivity` of each chosen linear layer, by path. Experimental.

    Args:
        model: plain, its weights loaded. It runs in evaluation mode, and ends as it was, random generators too.
        batches: inputs, each a tensor, a tuple of the model's arguments or a mapping of them by name; consumed once.
            Positions where ``attention_mask`` is 0 do not count.
        targets, exclude: as for :func:`ipca.apply_pc`; linear layers only.
        progress: show progress bars.

    Costs a full SVD in float64 of every layer, and a pass over the batches for every 4 GiB of ``in²`` float64 numbers.

    Raises:
        TypeError, ValueError: as :func:`ipca.apply_pc`; a layer is not linear or was never called; bad batches or
            inputs with NaN or Inf. The message names the layer.
    """
    names = [target.name for target in find_targets(model, measurable(targets, exclude))]
    return sensitivities(model, names, batches, progress=progress)


def measurable(targets: str | Iterable[str], exclude: str | Iterable[str]) -> AdapterSettings:
    """Settings that choose layers for a measurement, which must not fail for a rank, window or form."""
    return AdapterSettings(rank=1, window="principal", form="intact", targets=targets, exclude=exclude)


def suggest_windows(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    rank: int = 16,
    rank_pattern: Mapping[str, int] | None = None,
    targets: str | Iterable[str] = "all-linear",
    exclude: str | Iterable[str] = (),
    progress: bool = True,
) -> dict[str, Window]:
    """The window that ``window="auto"`` finds for each chosen layer. Experimental.

    It is the window with the smallest ``Σ S_i · energy_i``, see :class:`LayerSensitivity`: where a step of a given
    length in ``B`` changes the layer's output least on these inputs. The model stays as it is. The windows fit any
    other run: ``window_pattern={layer: window.text for layer, window in found.items()}``.

    Args:
        model, batches, targets, exclude, progress: as for :func:`sensitivity`.
        rank, rank_pattern: as for :func:`ipca.apply_pc`.

    Raises:
        TypeError, ValueError: as :func:`sensitivity`.
    """
    settings = AdapterSettings(
        rank=rank, rank_pattern=rank_pattern or {}, window="principal", targets=targets, exclude=exclude
    )
    ranks = {target.name: target.window.rank for target in find_targets(model, settings)}
    found = sensitivities(model, list(ranks), batches, progress=progress)
    return {name: layer.quietest(ranks[name]) for name, layer in found.items()}


def sensitivities(
    model: nn.Module,
    layers: Sequence[str],
    batches: Iterable[Any],
    *,
    unquantized_weights: UnquantizedWeights | None = None,
    progress: bool = True,
) -> dict[str, LayerSensitivity]:
    """As :func:`sensitivity`, of the ``layers`` at these paths, with ``unquantized_weights`` as in ``apply_pc``."""
    found = {}
    with tqdm(total=len(layers), desc="Full SVD", unit="layer", disable=not progress) as bar:
        for name, moment in input_energy(model, layers, batches, progress=progress):
            weight = source_matrix(get_layer(model, name), name, unquantized_weights).weight
            weight = (weight.cpu() if weight.device.type == "mps" else weight).to(torch.float64)
            _, S, Vh = torch.linalg.svd(weight, full_matrices=False)
            energy = ((Vh @ moment.to(Vh.device)) * Vh).sum(-1)
            found[name] = LayerSensitivity((weight.shape[0], weight.shape[1]), S.cpu(), energy.clamp_min(0).cpu())
            bar.update()
    return found


def input_energy(
    model: nn.Module, layers: Sequence[str], batches: Iterable[Any], *, progress: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Each layer's path and the second moment ``C = mean of x xᵀ (in, in)`` of its inputs, float64, on the CPU.

    The mean is over every position of every call, but those where the batch's ``attention_mask`` is 0 (for the
    decoder's own positions in an encoder-decoder model of transformers, its ``decoder_attention_mask``), where the
    layer's input has the mask's shape (or is that flattened). ``v_iᵀ C v_i`` is the energy along a direction.

    Args, Raises: as :func:`sensitivity`; ``layers`` are paths.
    """
    modules = {name: _linear(model, name) for name in layers}
    held = as_batches(batches)
    groups = _groups({name: _in_features(module) for name, module in modules.items()})
    with tqdm(total=len(groups) * len(held), desc="Calibration", unit="batch", disable=not progress) as bar:
        for group in groups:
            sums = {name: _Moment(_in_features(modules[name])) for name in group}
            with evaluating(model), _watched(model, {modules[name]: sums[name] for name in group}) as masks:
                for batch in held:
                    masks[:] = _masks_of(model, batch)
                    run_batch(model, batch)
                    bar.update()
            for name in group:
                yield name, sums.pop(name).mean(name)


class _Moment:
    """The sum of ``x xᵀ (in, in)`` over inputs, and how many there were."""

    def __init__(self, in_features: int) -> None:
        self.total = torch.zeros(in_features, in_features, dtype=torch.float64, device="cpu")
        self.count = 0

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        """Add the inputs ``x (…, in)`` where ``mask (…)``, if it is of that shape or that size, is not 0."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if mask is not None and x.shape[:-1] in (mask.shape, (mask.numel(),)):
            rows = rows[mask.flatten().to(rows.device) != 0]
        rows = (rows.cpu() if rows.device.type == "mps" else rows).to(torch.float64)
        self.total += (rows.mT @ rows).cpu()
        self.count += len(rows)

    def mean(self, name: str) -> Tensor:
        if self.count == 0:
            raise ValueError(f"{name}: no input reached it in these batches; exclude it, or name its window.")
        if not bool(torch.isfinite(self.total).all()):
            raise ValueError(f"{name}: its inputs hold NaN or Inf in these batches.")
        return self.total.div_(self.count)


@contextmanager
def _watched(model: Any, moments: Mapping[nn.Module, _Moment]) -> Iterator[list[Tensor | None]]:
    """Add the inputs of every call of a module within the block; the list holds the masks of the batch."""
    masks: list[Tensor | None] = [None, None]
    encoded: list[Tensor | None] = [None]
    decoder = _decoder(model)
    decoding = set() if decoder is None else set(decoder.modules())

    def entered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        encoded[:] = [kwargs.get("encoder_hidden_states")]

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        own = module in decoding and x is not encoded[0]  # keys and values of cross-attention are the encoder's
        moments[module].add(x, masks[own])

    handles = [module.register_forward_hook(called, with_kwargs=True) for module in moments]
    if decoder is not None:
        handles.append(decoder.register_forward_pre_hook(entered, with_kwargs=True))
    try:
        yield masks
    finally:
        for handle in handles:
            handle.remove()


def _decoder(model: Any) -> nn.Module | None:
    """The decoder of an encoder-decoder model of transformers."""
    model = inner_model(model)
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False) and hasattr(model, "get_decoder")
    found = model.get_decoder() if both else None
    return found if isinstance(found, nn.Module) else None


def _masks_of(model: nn.Module, batch: Any) -> list[Tensor | None]:
    """The mask of the inputs, and that of a decoder's own."""
    given = arguments_of(model, batch)
    masks = [given.get(name) for name in ("attention_mask", "decoder_attention_mask")]
    return [mask if isinstance(mask, Tensor) else None for mask in masks]


def _linear(model: nn.Module, name: str) -> nn.Module:
    module = get_layer(model, name)
    if layer_kind(module) not in LINEAR and quantization_kind(module) is None:
        raise ValueError(
            f"{name}: only linear layers can be measured, and this one is of the kind {layer_kind(module)!r}; "
            "exclude it, or name its window in window_pattern."
        )
    return module


def _in_features(module: nn.Module) -> int:
    if quantization_kind(module) is not None or isinstance(module, nn.Linear):
        return int(module.in_features)  # type: ignore[arg-type]
    return module.get_parameter("weight").shape[0]  # Conv1D (in, out)


def _groups(sizes: Mapping[str, int]) -> list[list[str]]:
    """The layers in their order, in groups whose second moments fit into the budget; one layer at least."""
    groups: list[list[str]] = []
    taken = 0
    for name, size in sizes.items():
        if not groups or taken + 8 * size**2 > _BUDGET:
            groups.append([])
            taken = 0
        groups[-1].append(name)
        taken += 8 * size**2
    return groups


def decompose_calibrated(
    model: nn.Module,
    targets: Sequence[Target],
    settings: AdapterSettings,
    calibration: Iterable[Any] | None,
    *,
    cache: SpectralCache | None,
    progress: bool,
    unquantized_weights: UnquantizedWeights | None = None,
    share: bool = True,
) -> list[InitialFactors]:
    """:func:`ipca.model.decompose.decompose_targets`, and of windows that are found from inputs.

    Args:
        calibration: batches of inputs, or None where no window needs them.

    Raises:
        TypeError, ValueError, RuntimeError: as ``decompose_targets``, or as :func:`sensitivity`; or ``calibration`` is
            missing, is not needed, or would differ between several processes.
    """
    made: dict[str, InitialFactors] = {}
    _check_calibration(targets, calibration)
    if calibration is not None:
        batches = as_batches(calibration)
        options: Any = {"unquantized_weights": unquantized_weights, "progress": progress}
        targets = auto_windows(model, targets, batches, **options)
        made = _of_inputs(model, targets, settings, batches, cache=cache, **options)
    rest = [target for target in targets if target.name not in made]
    found = decompose_targets(
        model, rest, settings, cache=cache, progress=progress, unquantized_weights=unquantized_weights, share=share
    )
    made |= zip((target.name for target in rest), found, strict=True)
    return [made[target.name] for target in targets]


def auto_windows(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Iterable[Any],
    *,
    unquantized_weights: UnquantizedWeights | None = None,
    progress: bool = True,
) -> list[Target]:
    """``targets`` with the windows that are found for those of window "auto", each at an explicit index.

    Raises:
        TypeError, ValueError: as :func:`sensitivity`.
    """
    names = [target.name for target in targets if target.window.start == AUTO]
    found = {}
    if names:
        found = sensitivities(model, names, batches, unquantized_weights=unquantized_weights, progress=progress)
    return [replace(t, window=found[t.name].quietest(t.window.rank)) if t.name in found else t for t in targets]


def _of_inputs(
    model: nn.Module,
    targets: Sequence[Target],
    settings: AdapterSettings,
    batches: Sequence[Any],
    *,
    cache: SpectralCache | None,
    unquantized_weights: UnquantizedWeights | None,
    progress: bool,
) -> dict[str, InitialFactors]:
    """The initial factors of the targets whose windows are of their inputs, by path.

    Layers that one input goes to, as queries, keys and values, have one second moment, which is decomposed once.
    """
    wanted = {target.name: target for target in targets if target.window.basis == "inputs"}
    made: dict[str, InitialFactors] = {}
    last: tuple[Tensor, Window, WindowSVD] | None = None
    with tqdm(total=len(wanted), desc="Windows of inputs", unit="layer", disable=not progress) as bar:
        for name, moment in input_energy(model, list(wanted), batches, progress=progress) if wanted else ():
            target = wanted[name]
            with naming(name):
                matrix = source_matrix(get_layer(model, name), name, unquantized_weights, target.kind)
                moment = moment.to(matrix.weight.device if matrix.weight.is_cuda else "cpu")
                if last is None or last[1] != target.window or not torch.equal(last[0], moment):
                    found = directions_of_inputs(moment, target.window, tol=settings.tol, cache=cache)
                    last = moment, target.window, found
                factors = split_window(target, settings, matrix, part_on_directions(matrix.weight, last[2]))
            device = matrix.weight.device
            made[name] = replace(factors, A0=factors.A0.to(device), B0=factors.B0.to(device))
            bar.update()
    return made


def directions_of_inputs(
    moment: Tensor, window: Window, *, tol: float | str = "default", cache: SpectralCache | None = None
) -> WindowSVD:
    """The directions of a layer's inputs in ``window``: the window of ``C = V diag(λ) Vᵀ``, certified.

    Args:
        moment: ``C = mean of x xᵀ (in, in)``, float64.
        window: of basis ``"inputs"``.
        tol, cache: as for :func:`ipca.window_svd`.

    Returns:
        ``S (rank,)``, the energies ``λ``, descending, and ``Vh (rank, in)``, the directions.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`ipca.window_svd`; or the inputs are all 0.
    """
    if not bool(moment.any()):
        raise ValueError("its inputs are all 0 in these batches and have no directions; exclude it.")
    place = window.of_moment
    if place.needs_spectrum:
        place = place.resolve(len(moment), singular_values(moment).sqrt())
    found = cached_window_svd(moment, place, tol=tol, dtype=torch.float64, cache=cache)
    report = replace(found.report, window=Window(found.report.window.index, window.rank, "inputs"))
    return replace(found, reports=(report,))


def part_on_directions(weight: Tensor, directions: WindowSVD) -> WindowSVD:
    """The part of ``weight`` that acts on ``directions``, as singular triplets::

        W V = U diag(S) R,    Vh = R Vᵀ,    U diag(S) Vh = W V Vᵀ

    On the directions of least energy this is the start of LoRA-Null (arXiv 2503.02659).

    Args:
        weight: ``W (out, in)``, any float dtype.
        directions: of :func:`directions_of_inputs`, ``Vᵀ = Vh (rank, in)``; the result is on its device.

    Returns:
        ``U (out, rank)``, ``S (rank,)``, ``Vh (rank, in)`` in float64, with the report of the directions.
    """
    V = directions.Vh.mT
    U, S, R = torch.linalg.svd(weight.detach().to(V) @ V, full_matrices=False)
    return WindowSVD(U, S, R @ V.mT, directions.reports)


def _check_calibration(targets: Sequence[Target], calibration: object) -> None:
    """Raise ValueError where a window is found from inputs and there are none, or of several processes; or reverse."""
    asked = [target for target in targets if target.window.needs_calibration]
    if calibration is None and asked:
        raise ValueError(
            f"{asked[0].name}: window {asked[0].window.text!r} is found from inputs of the model; pass some unlabeled "
            "batches to ipca.apply_pc, or with a PCConfig to ipca.peft.prepare, calibration=[…], or another window."
        )
    if calibration is not None and not asked:
        raise ValueError(
            "calibration is for windows that are found from inputs, 'auto' and 'inputs:…', and no layer's window is "
            "one; leave one of them out."
        )
    if asked and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"window {asked[0].window.text!r} would differ between the {dist.get_world_size()} processes, as their "
            "inputs do. Adapt the model in one process, save the adapter, and load it in all of them; the starts of "
            "'auto' can also be found with ipca.analysis.suggest_windows and given to all in window_pattern."
        )
