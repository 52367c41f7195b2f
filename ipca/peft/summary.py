"""A printable account of the windows in a PeftModel."""

from __future__ import annotations

from peft import PeftModel

from ipca.model.report import Summary, account
from ipca.peft.config import config_of
from ipca.peft.layers import WindowLora


def summary(model: PeftModel, adapter_name: str = "default") -> Summary:
    """Layers, windows and certificates of one adapter; parameters are counted over the whole model.

    Raises:
        TypeError: ``model`` is another module.
        ValueError: no adapter of that name, or not one of a PCConfig.
    """
    config = config_of(model, adapter_name)
    layers = [m for m in model.modules() if isinstance(m, WindowLora) and m.holds(adapter_name)]
    saved = {layer.path: config.layers[layer.path] for layer in layers if layer.path in config.layers}
    reports = {path: layer.report() for path, layer in saved.items()}
    windows = [(layer.shape, layer.start, layer.rank, layer.alpha, layer.form) for layer in saved.values()]
    return account(model, windows, {path: report for path, report in reports.items() if report}, {})
