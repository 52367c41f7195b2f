"""Whole models: choose layers, adapt them, summarize, merge, unload."""

from ipca.model.apply import (
    adapted_layers,
    apply_pc,
    check_inference_mode,
    install,
    train_only_adapter,
    uninterrupted,
)
from ipca.model.auto import suggest_windows
from ipca.model.calibration import LayerSensitivity, input_energy, sensitivity
from ipca.model.decompose import share
from ipca.model.merge import (
    adapter_parameters,
    check_not_sharded,
    disabled,
    fully_trained_modules,
    merge_adapter,
    require_adapted,
    unload,
    unmerge_adapter,
)
from ipca.model.optim import param_groups
from ipca.model.report import Summary, summary
from ipca.model.start import precision, start_of
from ipca.model.targets import Target, check_ambiguous_suffix, validate_targets

__all__ = [
    "LayerSensitivity",
    "Summary",
    "Target",
    "adapted_layers",
    "adapter_parameters",
    "apply_pc",
    "check_ambiguous_suffix",
    "check_inference_mode",
    "check_not_sharded",
    "disabled",
    "fully_trained_modules",
    "input_energy",
    "install",
    "merge_adapter",
    "param_groups",
    "precision",
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
    "validate_targets",
]
