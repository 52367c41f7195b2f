"""Models: adapting chosen layers, parameter groups, summary, merging and unloading."""

from ipca.model.apply import apply_pc
from ipca.model.calibration import LayerSensitivity, sensitivity, suggest_windows
from ipca.model.merge import adapter_parameters, disabled, merge_adapter, unload, unmerge_adapter
from ipca.model.optim import param_groups
from ipca.model.report import Summary, summary
from ipca.model.settings import AdapterSettings

__all__ = [
    "AdapterSettings",
    "LayerSensitivity",
    "Summary",
    "adapter_parameters",
    "apply_pc",
    "disabled",
    "merge_adapter",
    "param_groups",
    "sensitivity",
    "suggest_windows",
    "summary",
    "unload",
    "unmerge_adapter",
]
