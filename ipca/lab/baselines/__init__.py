"""Baselines for windows in the same layers: plain LoRA, full fine-tuning, and controls."""

from ipca.lab.baselines.adapt import apply
from ipca.lab.baselines.initialization import plain_lora_factors
from ipca.lab.baselines.methods import CONTROLS, check_method, kind_of, position_of

__all__ = ["CONTROLS", "apply", "check_method", "kind_of", "plain_lora_factors", "position_of"]
