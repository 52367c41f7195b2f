"""Collect runs of PROTOCOL.md in the background: ``make study-position-grid``, for as long as the machine is free.

    python -m studies.position_grid.run              add runs until none is left; killed at any time, the next goes on
    python -m studies.position_grid.run --how-far    what is there, and what remains
    python -m studies.position_grid.run --pause      all runners wait before their next step
    python -m studies.position_grid.run --resume     they go on
    python -m studies.position_grid.run --again 2    make two recorded runs again, and compare

Several runners share a folder: each run is made by one of them. A run takes 1 minute of one core with 60 steps and 3
with 240. ``STUDY_THREADS`` sets the threads of a runner. With ``--gpu`` the model is on a GPU, and ``--model`` names a
folder of another causal language model, which learns the language study's texts; it has a folder of rows of its own.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from studies.frontier.run import Material, main
from studies.frontier.texts import draw_samples
from studies.language import run as language
from studies.position_grid import mgm
from studies.position_grid.protocol import PROTOCOL, TEXT_MODELS


def load(folder: Path | None, device: str) -> Material:
    """MGM and its two tasks, or the language model in ``folder`` with those of the language study.

    Raises:
        FileNotFoundError, ValueError, OSError, ImportError: it cannot be loaded.
    """
    if folder is not None:
        return language.load(folder, device)
    base, genera = mgm.load_model(device), mgm.load_genera()
    chunks = (mgm.SAMPLES + mgm.HELD_OUT + mgm.TRAIN) // mgm.SAMPLES

    def draw() -> Tensor:
        return torch.cat([draw_samples(base, seed, mgm.SAMPLES, mgm.LENGTH, mgm.PADDING) for seed in range(chunks)])

    return Material(mgm.NAME, base, draw, lambda samples: mgm.task_texts(genera, samples))


if __name__ == "__main__":
    main(PROTOCOL, load, __doc__, others=TEXT_MODELS)
