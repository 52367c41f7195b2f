"""Fine-tuning in one call, and the instruments that measure, limit and trade what a model forgets.

::

    train.fine_tune(train.TrainSettings("path/to/model", "data.jsonl", keep="english.txt", max_kl=0.1), Path("out"))
    trainer.add_callback(train.KeepCallback(trainer, batches, max_kl=0.1))  # in a script of your own
    print(train.tradeoff(trainer, batches, max_forgotten=0.1))

It needs the extra ``train``: transformers, PEFT, TRL, datasets.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ipca.train.callback import KeepCallback
    from ipca.train.keep import KeptItems, KeptTask, KeptTokens, token_batches
    from ipca.train.outcome import Outcome
    from ipca.train.run import OverBudgetError, fine_tune
    from ipca.train.scaled_change import Point, Tradeoff, save_scaled, tradeoff
    from ipca.train.settings import TrainSettings
    from ipca.train.sources import DataError

__all__ = [
    "DataError",
    "KeepCallback",
    "KeptItems",
    "KeptTask",
    "KeptTokens",
    "Outcome",
    "OverBudgetError",
    "Point",
    "Tradeoff",
    "TrainSettings",
    "fine_tune",
    "save_scaled",
    "token_batches",
    "tradeoff",
]
_HOMES = {
    "callback": ("KeepCallback",),
    "keep": ("KeptItems", "KeptTask", "KeptTokens", "token_batches"),
    "outcome": ("Outcome",),
    "run": ("OverBudgetError", "fine_tune"),
    "scaled_change": ("Point", "Tradeoff", "save_scaled", "tradeoff"),
    "settings": ("TrainSettings",),
    "sources": ("DataError",),
}
"""The modules of the names above, imported when a name is first used: the command line's help needs no torch."""


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'ipca.train' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"ipca.train.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
