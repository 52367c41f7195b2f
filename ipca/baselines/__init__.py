"""What a window is compared with: plain LoRA, training whole weights, and controls, in the same layers."""

from ipca.baselines.apply import apply
from ipca.baselines.names import CONTROLS, check_method, kind_of, position_of
from ipca.baselines.starts import plain_lora_start

__all__ = ["CONTROLS", "apply", "check_method", "kind_of", "plain_lora_start", "position_of"]
