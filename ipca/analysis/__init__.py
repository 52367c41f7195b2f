"""Measures of models before and after training: pure functions, which leave the model as it is.

::

    print(analysis.spectrum(model))  # spectra, and the windows in them
    analysis.update_norm(model)  # ‖ΔW‖ / ‖W‖
    analysis.draw_drift(analysis.drift(model), "drift.png")
"""

from ipca.analysis.figures import draw_drift, draw_importance, draw_sensitivity, draw_spectra
from ipca.analysis.importance import BlockImportance, component_importance
from ipca.analysis.layer_pairs import LayerPair, weight_pairs
from ipca.analysis.retention import (
    Forgetting,
    accuracy_drop,
    cross_entropy_rise,
    embedding_drift,
    forgetting,
    kl_to_base,
)
from ipca.analysis.spectra import LayerSpectrum, Spectra, spectrum
from ipca.analysis.weight_change import (
    Drift,
    WindowAngles,
    drift,
    intruder_dimensions,
    overlap,
    principal_angles,
    spectral_imbalance,
    update_norm,
)
from ipca.analysis.without_adapter import without_adapter
from ipca.model.calibration import sensitivity, suggest_windows

__all__ = [
    "BlockImportance",
    "Drift",
    "Forgetting",
    "LayerPair",
    "LayerSpectrum",
    "Spectra",
    "WindowAngles",
    "accuracy_drop",
    "component_importance",
    "cross_entropy_rise",
    "draw_drift",
    "draw_importance",
    "draw_sensitivity",
    "draw_spectra",
    "drift",
    "embedding_drift",
    "forgetting",
    "intruder_dimensions",
    "kl_to_base",
    "overlap",
    "principal_angles",
    "sensitivity",
    "spectral_imbalance",
    "spectrum",
    "suggest_windows",
    "update_norm",
    "weight_pairs",
    "without_adapter",
]
