"""Checkpoints of a run: the newest complete one, and training that goes on from it, also where it had ended."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from transformers import TrainerState

from ipca._atomic import write_atomic

log = logging.getLogger("ipca.train")
_STATE = "trainer_state.json"


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return next((path for path in reversed(found) if _is_complete(path)), None)


def train_from(trainer: Any, checkpoint: Path | None) -> None:
    """Train from ``checkpoint`` on; where training had ended there, load what it ended with: a Trainer would go on."""
    if checkpoint is None:
        trainer.train()
        return
    log.info("going on from %s", checkpoint)
    if not _read_state(checkpoint)["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]:
        trainer.args.eval_on_start = False  # measured already
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return
    trainer.state = TrainerState.load_from_json(str(checkpoint / _STATE))
    if trainer.state.best_model_checkpoint is None:
        trainer._load_from_checkpoint(str(checkpoint))
    else:
        trainer._load_best_model()


def relocate(checkpoint: Path) -> None:
    """Let ``checkpoint`` find the best one beside it: their folder may have been moved, or be named from elsewhere."""
    state = _read_state(checkpoint)
    if best := state["best_model_checkpoint"]:
        state["best_model_checkpoint"] = str(checkpoint.parent / Path(best).name)
        write_atomic(checkpoint / _STATE, json.dumps(state, indent=2).encode())


def _read_state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / _STATE).read_text())
    return state


def _is_complete(checkpoint: Path) -> bool:
    """Whether the trainer's state, which is written last, is there and whole."""
    try:
        return isinstance(_read_state(checkpoint), dict)
    except (OSError, ValueError):
        return False
