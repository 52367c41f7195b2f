"""Collect runs of PROTOCOL.md in the background: ``make study-vision``, for as long as the machine is free.

    python -m studies.vision.run              add runs until none is left; killed at any time, the next call goes on
    python -m studies.vision.run --how-far    what is there, and what remains
    python -m studies.vision.run --pause      all runners wait before their next step, within seconds
    python -m studies.vision.run --resume     they go on

Several runners share a folder: each run is made by one of them. A run takes about 3 minutes of one core with 60 steps
and 7 with 240. ``STUDY_THREADS`` sets the threads of a runner. With ``--gpu`` the model is on a GPU. The packages that
hold model and images are in ``$IPCA_STUDY_PACKAGES``, or where ``make study-vision`` puts them.
"""

from __future__ import annotations

import os
from pathlib import Path

from studies.frontier.run import Material, main
from studies.language.model import DOWNLOADS
from studies.vision.material import task_images
from studies.vision.model import NAME, load_model
from studies.vision.protocol import PROTOCOL


def load(folder: Path | None, device: str) -> Material:
    """DINOv2-small and its task.

    Raises:
        FileNotFoundError, ValueError, ImportError: they cannot be loaded.
    """
    if folder is not None:
        raise ValueError(f"the vision study has one model, {NAME}; leave --model {folder} out.")
    packages = Path(os.environ.get("IPCA_STUDY_PACKAGES") or DOWNLOADS)
    base = load_model(packages, device)
    return Material(NAME, base, None, lambda _: {"kinds": task_images(base, packages)})


if __name__ == "__main__":
    main(PROTOCOL, load, __doc__)
