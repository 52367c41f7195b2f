"""Adapter files: save, load, export."""

from ipca.io.adapter import load_adapter, save_adapter
from ipca.io.export import export
from ipca.io.files import check_target, staged_files, staged_folder

__all__ = ["check_target", "export", "load_adapter", "save_adapter", "staged_files", "staged_folder"]
