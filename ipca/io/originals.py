"""load_unquantized_weights: the weights of a checkpoint by layer, each read from disk when it is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from ipca.io.checkpoint import INDEX, WHOLE, Checkpoint

_END = ".weight"


class CheckpointWeights(Mapping[str, Tensor]):
    """The tensors ``<layer>.weight`` of a ``checkpoint`` by the layer's path, ``(out, in)`` as linear layers have them.

    A layer ``encoder.query`` has the tensor ``encoder.query.weight``; or else the only one whose name ends so, or that
    is itself the end of this name: a model and its checkpoint often differ by the prefix of the base model.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def __getitem__(self, layer: str) -> Tensor:
        key = self._key(layer)
        if key is None:
            raise KeyError(f"the checkpoint has no tensor that is {layer}{_END} alone")
        return self.checkpoint.read(key)

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, str) and self._key(layer) is not None

    def __iter__(self) -> Iterator[str]:
        return (key.removesuffix(_END) for key in self.checkpoint.tensors if key.endswith(_END))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _key(self, layer: str) -> str | None:
        own, keys = layer + _END, self.checkpoint.tensors
        if own in keys:
            return own
        alike = [key for key in keys if key.endswith("." + own) or own.endswith("." + key)]
        return alike[0] if len(alike) == 1 else None


def load_unquantized_weights(folder: str | os.PathLike[str]) -> CheckpointWeights:
    """The weights in ``folder`` for ``ipca.apply_pc(…, unquantized_weights=…)``; one is in memory at a time.

    Args:
        folder: holds the model before it was quantized, as ``save_pretrained`` writes it, in safetensors.

    Raises:
        FileNotFoundError: there is no such checkpoint, or a shard is missing.
        ValueError: a file is damaged.
    """
    checkpoint = Checkpoint.open(Path(folder))
    if checkpoint is None:
        raise FileNotFoundError(f"{folder} holds neither {WHOLE} nor {INDEX}; give the folder of the original model.")
    return CheckpointWeights(checkpoint)
