"""Explanation of the backend that computes a layer for an input, and of the backends that could."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ipca.nn.linear import LinearPC
from ipca.ops import BACKENDS
from ipca.ops.backend import LinearShape, choose, get_backend, linear_shape, unsupported_reason
from ipca.ops.linear import to_autocast, trains, transformed
from ipca.ops.op import Layer


@dataclass(frozen=True)
class Explanation:
    """The backend and the kernels that run for one layer and one input; ``str()`` gives the text.

    Attributes:
        backend: ``"triton"``, ``"addmm"``, ``"merged"``, ``"reference"``, or ``"linear"`` where no low-rank part is
            computed.
        reason: why that backend.
        kernels: the Triton kernels of the forward and their configurations, none where PyTorch's own run.
        text: all of it in a sentence.
    """

    backend: str
    reason: str
    kernels: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return self.text


def explain(layer: LinearPC, x: Tensor) -> Explanation:
    """Explain which backend runs ``layer(x)``, and why, by the code that chooses it. Computes nothing.

    >>> layer = ipca.nn.LinearPC.from_linear(nn.Linear(64, 32), ipca.Window.middle(4))
    >>> ipca.explain(layer, torch.ones(1, 64)).backend
    'reference'

    Args:
        layer: an adapted layer.
        x: an input, ``(…, in_features)``, on the layer's device.

    Raises:
        TypeError: ``layer`` is another module.
        ValueError: ``x`` has the wrong number of features.
        RuntimeError: the backend set by name cannot run.
    """
    shape = _shape_of_call(layer, x)
    if layer.is_plain:
        reason = "the layer is merged" if layer.merged and not layer.is_disabled else "the layer is disabled"
        return Explanation("linear", reason, (), f"{shape}: one plain product, because {reason}.")
    if transformed():
        reason = "a torch.func transform, or derivatives in forward mode"
        return Explanation("reference", reason, (), f"The reference, inside {reason}.")
    choice = choose(get_backend(), shape)
    kernels = _kernels(layer, x, choice.backend) if choice.low_rank_in_triton else ()
    text = f"{shape}: {choice.backend}, because {choice.reason}."
    if kernels:
        text += f" Kernels: {'; '.join(kernels)}."
    return Explanation(choice.backend, choice.reason, kernels, text)


def backends(layer: LinearPC, x: Tensor) -> dict[str, str]:
    """Every backend with the reason why it cannot run ``layer(x)``, an empty text where it can.

    Args:
        layer, x: as for :func:`explain`.

    Raises:
        TypeError, ValueError: as :func:`explain`.
    """
    shape = _shape_of_call(layer, x)
    return {name: unsupported_reason(name, shape) for name in BACKENDS}


def _shape_of_call(layer: LinearPC, x: Tensor) -> LinearShape:
    if not isinstance(layer, LinearPC):
        raise TypeError(f"expected a LinearPC, got {type(layer).__name__}; take one from a model's modules().")
    if x.shape[-1] != layer.in_features:
        raise ValueError(f"x has {x.shape[-1]} features, but the layer takes {layer.in_features}.")
    x, weight, bias = to_autocast(x, layer.base_weight, layer.bias)
    A0, B0 = (layer.lora_A0, layer.lora_B0) if layer.form == "intact" else (None, None)
    tensors = Layer(weight, layer.lora_A, layer.lora_B, bias, A0, B0, layer.scaling)
    dropout = layer.dropout if layer.training and not layer.is_disabled else 0.0
    return linear_shape(x, weight, layer.lora_A, A0, dropout, trains(x, tensors))


def _kernels(layer: LinearPC, x: Tensor, backend: str) -> tuple[str, ...]:
    """The forward's kernels with their configurations."""
    from ipca.kernels import few_tokens, linear
    from ipca.kernels.tuning import choose as config

    x, weight = to_autocast(x, layer.base_weight)
    rows = x.detach().reshape(-1, x.shape[-1])
    dropout = bool(layer.dropout) and layer.training and not layer.is_disabled
    (N, K), S = weight.shape, layer.rank * (2 if layer.form == "intact" else 1)
    if backend == "triton" and few_tokens.takes(rows, S):
        return (f"few_tokens {config('few_tokens', rows, N=N, K=K, R=S, dropout=dropout, rerun=None).describe()}",)
    project = f"project {config('project', rows, N=S, K=K, R=S, dropout=dropout, rerun=None).describe()}"
    if backend != "triton":
        return (project,)
    tma = linear.uses_descriptors(rows, weight)
    large = config("linear", rows, N=N, K=K, R=S, tma=tma, rerun=None)
    return project, f"linear {large.describe()}, {'TMA' if tma else 'pointers'}"
