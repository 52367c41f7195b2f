"""Whole models: choose layers, adapt them, summarise, merge, unload."""

from ipca.model.apply import (
    adapted_layers,
    apply_pc,
    install,
    refuse_inference_mode,
    train_only_adapter,
    uninterrupted,
)
from ipca.model.auto import suggest_windows
from ipca.model.calibration import LayerSensitivity, input_energy, sensitivity
from ipca.model.decompose import share
from ipca.model.merge import (
    adapter_parameters,
    disabled,
    merge_adapter,
    refuse_sharded,
    require_adapted,
    unload,
    unmerge_adapter,
    whole_modules,
)
from ipca.model.optim import param_groups
from ipca.model.report import Summary, summary
from ipca.model.start import precision, start_of
from ipca.model.targets import Target, refuse, refuse_suffix

__all__ = [
    "LayerSensitivity",
    "Summary",
    "Target",
    "adapted_layers",
    "adapter_parameters",
    "apply_pc",
    "disabled",
    "input_energy",
    "install",
    "merge_adapter",
    "param_groups",
    "precision",
    "refuse",
    "refuse_inference_mode",
    "refuse_sharded",
    "refuse_suffix",
    "require_adapted",
    "sensitivity",
    "share",
    "start_of",
    "suggest_windows",
    "summary",
    "train_only_adapter",
    "uninterrupted",
    "unload",
    "unmerge_adapter",
    "whole_modules",
]
