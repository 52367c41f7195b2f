"""Adapter files: save, load, export, import."""

from ipca.io.adapter import load_adapter, save_adapter
from ipca.io.checkpoint import load_unquantized_weights
from ipca.io.export_formats import export
from ipca.io.from_peft import import_peft
from ipca.io.model_card import write_model_card

__all__ = ["export", "import_peft", "load_adapter", "load_unquantized_weights", "save_adapter", "write_model_card"]
