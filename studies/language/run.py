"""Collect runs of PROTOCOL.md in the background: ``make study-language``, for as long as the machine is free.

    python -m studies.language.run              add runs until none is left; killed at any time, the next call goes on
    python -m studies.language.run --how-far    what is there, and what remains
    python -m studies.language.run --pause      all runners wait before their next step, within seconds
    python -m studies.language.run --resume     they go on

Several runners share a folder: each run is made by one of them. A run takes about 9 minutes of one core with 60 steps
and 18 with 240. ``STUDY_THREADS`` sets the threads of a runner. With ``--gpu`` the model is on a GPU, and ``--model``
names a folder of another causal language model, whose rows go into a folder of their own.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from studies.frontier.run import Material, main
from studies.frontier.texts import Texts, draw_samples
from studies.language import model as models
from studies.language.protocol import PROTOCOL
from studies.language.texts import LENGTH, SAMPLES, archive_path, task_texts

_SEED_OF_SAMPLES = 0


def load(folder: Path | None, device: str) -> Material:
    """The causal language model in ``folder``, SmolLM2 by default, that learns German or C++.

    Raises:
        FileNotFoundError, ValueError, OSError, ImportError: it cannot be loaded.
    """
    name = models.NAME if folder is None else folder.name
    folder = folder or models.model_folder()
    base, tokenizer = models.load_model(folder, device), models.load_tokenizer(folder)

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def texts(samples: Tensor) -> dict[str, Texts]:
        return task_texts(tokenize, archive_path(), samples)

    return Material(name, base, lambda: draw_samples(base, _SEED_OF_SAMPLES, SAMPLES, LENGTH), texts)


if __name__ == "__main__":
    main(PROTOCOL, load, __doc__)
