"""What a plain layer has beside what its class defines: tensors, which would be lost, and attributes, which move."""

from __future__ import annotations

from torch import nn

_TAKEN = "_ipca_taken"
_USUAL = ("weight", "bias", "embed_scale")


def held_beside(module: nn.Module) -> list[str]:
    """The names of parameters, buffers and modules that a plain layer holds beside its weight and bias."""
    held = {**module._parameters, **module._buffers, **module._modules}
    return [name for name in held if name not in _USUAL]


def take_attributes(layer: nn.Module, plain: nn.Module) -> None:
    """Give ``layer``, which takes the place of ``plain``, the public attributes that it lacks."""
    usual = vars(nn.Module())
    public = {name: value for name, value in vars(plain).items() if name not in usual and not name.startswith("_")}
    taken = {name: value for name, value in public.items() if not hasattr(layer, name)}
    vars(layer).update({**taken, _TAKEN: tuple(taken)})


def return_attributes(layer: nn.Module, plain: nn.Module) -> None:
    """Put what :func:`take_attributes` gave ``layer``, as it is now, on ``plain``, which takes its place."""
    taken = {name: vars(layer)[name] for name in getattr(layer, _TAKEN, ()) if name in vars(layer)}
    vars(plain).update({name: value for name, value in taken.items() if name not in vars(plain)})
