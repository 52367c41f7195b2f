"""OSF, by PEFT's own tuner: all but the largest singular components train, and stay orthogonal to those."""

from __future__ import annotations

from torch import nn

from ipca._atomic import uninterrupted
from ipca.analysis.linalg import check_finite
from ipca.lab.continual.method import Adapter, Method, Setup


def osf(setup: Setup) -> Method:
    """For every task the current weights' SVD; its largest components are protected, the rest train and are folded.

    See :mod:`ipca.lab.continual.osf_layers`. ``rank``, ``alpha`` and ``window`` of the configuration say nothing here.

    Raises:
        ImportError: PEFT is missing.
    """
    try:
        from ipca.lab.continual.osf_layers import fold_osf, inject_osf
    except ModuleNotFoundError as error:
        raise ImportError(f"method 'osf' needs PEFT ({error}); pip install 'ipca-lora[peft]'.") from None
    names = [target.name for target in setup.targets]

    def begin(model: nn.Module, index: int) -> None:
        for name in names:
            check_finite(name, model.get_submodule(name).get_parameter("weight"))
        with uninterrupted():
            inject_osf(model, names, setup.protected)
            for name in setup.modules_to_save:
                model.get_submodule(name).requires_grad_(True)

    def end(model: nn.Module) -> Adapter:
        fold_osf(model)
        return {}

    return Method(begin=begin, end=end)
