"""Baselines for windows in the same layers: plain LoRA, full fine-tuning, methods of other papers, and controls."""

from ipca.lab.baselines.adapt import apply
from ipca.lab.baselines.initialization import plain_lora_factors
from ipca.lab.baselines.methods import BASELINES, CONTROLS, check_method, kind_of, position_of
from ipca.lab.baselines.peft_methods import penalty
from ipca.lab.baselines.scaled import scaled

__all__ = ["BASELINES", "CONTROLS", "apply", "check_method", "kind_of", "penalty", "plain_lora_factors", "position_of"]
__all__ += ["scaled"]
