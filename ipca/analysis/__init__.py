"""Measures of models before and after training: pure functions, which leave the model as it is.

>>> from ipca import analysis
>>> print(analysis.spectrum(model))                # spectra, and where the windows sit
>>> analysis.update_norm(model)                    # ‖ΔW‖ / ‖W‖
>>> analysis.draw_drift(analysis.drift(model), "drift.png")
"""

from ipca.analysis.compare import Matched, best_rate, draw_frontier, frontier, target_matched
from ipca.analysis.draw import draw_drift, draw_spectra
from ipca.analysis.draw_windows import draw_importance, draw_sensitivity
from ipca.analysis.drift import Drift, WindowAngles, drift, principal_angles
from ipca.analysis.importance import BlockImportance, component_importance
from ipca.analysis.pairs import LayerPair, weight_pairs
from ipca.analysis.retention import accuracy_drop, cross_entropy_rise, kl_to_base
from ipca.analysis.spectra import LayerSpectrum, Spectra, spectrum
from ipca.analysis.statistics import Interval, PairedTest, bootstrap_interval, holm, paired_bootstrap, paired_test
from ipca.analysis.stream import TaskMatrix
from ipca.analysis.update import intruder_dimensions, overlap, spectral_imbalance, update_norm
from ipca.model import LayerSensitivity, sensitivity, suggest_windows

__all__ = [
    "BlockImportance",
    "Drift",
    "Interval",
    "LayerPair",
    "LayerSensitivity",
    "LayerSpectrum",
    "Matched",
    "PairedTest",
    "Spectra",
    "TaskMatrix",
    "WindowAngles",
    "accuracy_drop",
    "best_rate",
    "bootstrap_interval",
    "component_importance",
    "cross_entropy_rise",
    "draw_drift",
    "draw_frontier",
    "draw_importance",
    "draw_sensitivity",
    "draw_spectra",
    "drift",
    "frontier",
    "holm",
    "intruder_dimensions",
    "kl_to_base",
    "overlap",
    "paired_bootstrap",
    "paired_test",
    "principal_angles",
    "sensitivity",
    "spectral_imbalance",
    "spectrum",
    "suggest_windows",
    "target_matched",
    "update_norm",
    "weight_pairs",
]
