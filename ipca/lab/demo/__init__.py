"""``ipca demo``: fine-tune a real model on real text with three windows and with plain LoRA, and measure forgetting."""

from ipca.lab.demo.run import run_demo

__all__ = ["run_demo"]
