"""The text that ``ipca inspect`` prints about a model: the table of spectra, and what the adapter would take."""

from __future__ import annotations

from ipca.analysis.spectra import Spectra
from ipca.cli.table import mib


def render(found: Spectra) -> str:
    """The table that people read."""
    sums = found.totals()
    return (
        f"{found}\n{sums['layers']} layers, {sums['trainable']:,} parameters train ({100 * sums['share']:.2f} %); "
        f"adapter file {mib(sums['file_bytes'])}, factors in memory {mib(sums['memory_bytes'])}, "
        f"AdamW {mib(sums['adamw_bytes'])} more (float32)"
    )
