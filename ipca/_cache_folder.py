"""The folder of decompositions and kernel measurements that are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_folder() -> Path:
    """``$IPCA_CACHE``, else ``~/.cache/ipca``."""
    return Path(os.environ.get("IPCA_CACHE") or "~/.cache/ipca").expanduser()
