"""Records of the layers that a PCConfig adapts: initial factors, base hashes, entries of ``ipca.json``."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

from ipca.io.adapter_folder import AdapterFolder, Factors, SavedLayer
from ipca.nn.initialization import InitCertificate, InitialFactors

OTHER_WINDOW = (
    "a state dict was loaded that starts from another window, or from that of another base, than the PCConfig says: it "
    "is computed right, but saved as a stock LoRA, without ipca.json. To resume a window use "
    "peft.PeftModel.from_pretrained(base, folder, is_trainable=True), which takes that of the folder"
)


WRITTEN = (
    "somebody wrote into what state_dict() gave, a copy of the factors of a window beside their initial ones, and the "
    "model did not change. Average model.parameters() instead, as torch.optim.swa_utils.AveragedModel does, or pass "
    "what was written to load_state_dict"
)


@dataclass
class LayerRecords:
    """The state that a PCConfig carries between :func:`ipca.peft.prepare`, the layers, and the adapter's files.

    Paths are those in the model that PEFT wraps. The layers read and write the records, see
    :meth:`ipca.peft.layers.WindowLora.init_adapter`.

    Attributes:
        waiting: layers that have no initial factors yet, in the order in which PEFT has made them.
        initial: factors that were prepared or read from a file; a layer takes its own out.
        base_sha256: hashes of the base weights that an adapter read from a file belongs to.
        saved: what ``ipca.json`` holds of each layer.
        labels: the names of the classes of the model, or of the adapter that was read, by index.
        replaced: layers of which a state dict has brought another window, or that of another base, than ``saved`` says.
        written: whether it was warned that somebody has written into a state dict.
        loaded: whether they were read from an adapter's folder, whose configuration names heads and layers already.
    """

    waiting: list[Any] = field(default_factory=list)
    initial: dict[str, InitialFactors] = field(default_factory=dict)
    base_sha256: dict[str, str] = field(default_factory=dict)
    saved: dict[str, SavedLayer] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    replaced: set[str] = field(default_factory=set)
    loaded: bool = False
    written: bool = False

    def replace(self, path: str) -> None:
        """Note that a layer starts from another window than its record says, and warn."""
        self.replaced.add(path)
        warnings.warn(f"{OTHER_WINDOW}.", RuntimeWarning, stacklevel=2)

    def warn_written(self, path: str) -> None:
        """Warn of the first layer of which somebody has written into a state dict, in which the others are too."""
        if not self.written:
            self.written = True
            warnings.warn(f"{path}: {WRITTEN}.", RuntimeWarning, stacklevel=2)

    @classmethod
    def of(cls, adapter: AdapterFolder) -> LayerRecords:
        """The records of an adapter that was read from its folder, so that its layers need no SVD."""
        return cls(
            initial={path: _initial(layer, adapter.factors[path]) for path, layer in adapter.layers.items()},
            base_sha256={path: layer.base_sha256 for path, layer in adapter.layers.items() if layer.base_sha256},
            saved=dict(adapter.layers),
            labels=adapter.labels,
            loaded=True,
        )


def _initial(layer: SavedLayer, factors: Factors) -> InitialFactors:
    dtype = str(factors.A0.dtype).removeprefix("torch.")
    certificate = InitCertificate(dtype, 0.0, 0.0, 0.0)
    return InitialFactors(factors.A0, factors.B0, layer.window, layer.base_sha256 or "", layer.report(), certificate)
