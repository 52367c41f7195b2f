"""What a window is compared with: plain LoRA, training whole weights, and controls, in the same layers."""

from ipca.lab.baselines.apply import apply
from ipca.lab.baselines.initialization import plain_lora_start
from ipca.lab.baselines.methods import CONTROLS, check_method, kind_of, position_of

__all__ = ["CONTROLS", "apply", "check_method", "kind_of", "plain_lora_start", "position_of"]
