"""Adapter files: save, load, export."""

from ipca.io.adapter import load_adapter, save_adapter
from ipca.io.export_formats import export
from ipca.io.files import check_writable, staged_files, staged_folder
from ipca.io.from_peft import import_peft
from ipca.io.model_card import write_model_card
from ipca.io.originals import load_unquantized_weights

__all__ = [
    "check_writable",
    "export",
    "import_peft",
    "load_adapter",
    "load_unquantized_weights",
    "save_adapter",
    "staged_files",
    "staged_folder",
    "write_model_card",
]
