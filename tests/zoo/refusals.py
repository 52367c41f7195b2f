"""Refusals that are right, each with its reason; anything else that is not ok is a fault."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from tests.zoo.rows import Row


class Refusal(NamedTuple):
    """What may be refused.

    Attributes:
        architectures, checks: regular expressions for their whole names.
        message: a regular expression, found in the row's text.
        reason: for users.
    """

    architectures: str
    checks: str
    message: str
    reason: str

    def covers(self, row: Row) -> bool:
        """Whether ``row`` is this refusal."""
        names = ((self.architectures, row.architecture), (self.checks, row.check))
        return all(re.fullmatch(*pair) for pair in names) and re.search(self.message, row.text) is not None


MAMBA = "mamba|mamba2|falcon_mamba|falcon_h1|nemotron_h"
OUT_PROJ = "PEFT has no LoRA for the `out_proj` of these models and refuses it. Saving says so: exclude it, or merge."
NOT_CALLED = "reads the weight and does not call the layer"
REFUSALS = (
    Refusal(
        ".*",
        r"\w+\.\w+\.(stock\w*|export_\w+|load_natively|load_native_folder)|\w+\.(cli\.residual|peft\.merge)",
        NOT_CALLED,
        "The model reads a layer's weight and does not call the layer. Natively that is right; PEFT computes nothing "
        "there, until it merges. Adapting, saving and merging name the layers: exclude them, or merge natively.",
    ),
    Refusal(
        ".*",
        r"\w+\.cli\.residual",
        "told: .*the model calls the layer or reads its weight, by device and settings",
        "Where the model reads a layer's weight instead of calling the layer, `W_res` alone is wrong. Its code does "
        "both: `ipca init` warns and names the layer; exclude it, or use the default form.",
    ),
    Refusal(MAMBA, r"\w+\.\w+\.stock\w*", "told: PEFT cannot load", OUT_PROJ),
    Refusal(
        MAMBA,
        r"\w+\.(\w+\.export_\w+|peft\.load_native_folder|cli\.residual)",
        "Module 'out_proj' is incompatible with Mamba-based models",
        OUT_PROJ,
    ),
    Refusal(
        ".*",
        r"\w+\.peft\.load_natively",
        "as the weight of a router is, which only PEFT adapts: load the folder with peft",
        'PEFT\'s "all-linear" adapts the weight of a router, which is no layer; only PEFT loads such an adapter.',
    ),
    Refusal(
        ".*",
        r"linear\.intact\.export_serve",
        "trained whole, and servers read only LoRA factors",
        "Servers take no head that trains whole; the message says to merge and serve the merged model.",
    ),
    Refusal(
        "resnet|regnet|mobilenet_v2|poolformer|encodec",
        r"linear\.(intact|residual|peft)\.apply|linear\.cli\.(inspect|init|residual)",
        "has no linear layer to adapt|No modules were targeted for adaptation",
        "A convolutional network has no linear layer but its head; its convolutions are adapted by name.",
    ),
    Refusal(
        "ibert",
        r"linear\.(intact|residual|peft)\.apply|linear\.cli\.(inspect|init|residual)",
        "has no linear layer to adapt|No modules were targeted for adaptation",
        "Its layers are of a class of its own, which quantizes while it trains; neither ipca nor PEFT adapts it.",
    ),
    Refusal(
        "reformer",
        r"\w+\.\w+\.gradients",
        r"make sure to use `model\.train\(\)`",
        "The model itself has gradients in training mode only, and the check needs evaluation mode.",
    ),
    Refusal(
        "git",
        r"\w+\.\w+\.training_mode",
        "a leaf Variable that requires grad is being used in an in-place operation",
        "For gradient checkpointing transformers lets the embeddings' output require gradients, and this model adds to "
        "it in place. Stock LoRA fails alike.",
    ),
    Refusal(
        "rwkv",
        r".*",
        "writing into it would change nothing",
        "In evaluation the model divides weights of its own by powers of 2, into which an adapted layer refuses to be "
        "written; set `config.rescale_every = 0`, which computes the same (rwkv_not_rescaled).",
    ),
    Refusal(
        "wav2vec2.*",
        r"linear\.intact\.stock_transformers",
        "adapter_attn_dim",
        "The class has a `load_adapter` of its own, for adapters of another kind; PEFT loads the folder.",
    ),
)
AS_STOCK = "Stock LoRA fails alike."
LIKE_STOCK = {
    r"(peft|trainer_peft)\.(apply|head|start|gradients)": "apply",
    r"(peft|trainer_peft)\.(save|load|load_natively|resume|best_at_end)": "load",
    r"peft\.load_native_folder|cli\.residual|\w+\.stock(_transformers)?": "load",
    r"peft\.merge|\w+\.stock_merge": "merge",
}
"""Checks in which PEFT takes part, and the one of stock LoRA that does the same."""
RIGHT = ("ok", "none", "needs")


def refusal(row: Row, rows: Iterable[Row]) -> str | None:
    """Why a row that is not ok is right, or None."""
    for known in REFUSALS:
        if known.covers(row):
            return known.reason
    selection, _, check = row.check.partition(".")
    if check.startswith("lora."):
        return AS_STOCK
    alike = {f"{selection}.lora.{step}" for pattern, step in LIKE_STOCK.items() if re.fullmatch(pattern, check)}
    return AS_STOCK if any(stock.check in alike and fails_alike(row, stock) for stock in rows) else None


def fails_alike(row: Row, stock: Row) -> bool:
    """Whether both gave a wrong result, or exceptions of one type."""
    same_type = row.text.partition(":")[0] == stock.text.partition(":")[0]
    return row.outcome == stock.outcome and (row.outcome == "wrong" or same_type)


def faults(rows: Iterable[Row]) -> list[Row]:
    """The rows that are neither right nor refused."""
    rows = list(rows)
    return [row for row in rows if row.outcome not in RIGHT and refusal(row, rows) is None]
