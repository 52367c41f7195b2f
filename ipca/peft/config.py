"""PCConfig for PEFT: a LoraConfig whose layers train a window of singular components of the base weight.

PEFT's own fields keep their names and meaning; ``r`` is the number of components that train. What is saved is a stock
LoRA of rank ``2 r`` on the untouched base: ``lora_A = [A; A0]``, ``lora_B = [B, −B0]``, see
:mod:`ipca.io.peft_format`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import nn

from ipca.peft.dispatch import build_layer
from ipca.peft.records import LayerRecords
from ipca.peft.save_load import OWN_FIELDS, load_config, save_config, stock_config
from ipca.svd.decompose import tolerance
from ipca.window import Window, as_pattern_window, as_window, check_factors

_REFUSED = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
    "arrow_config",
    "kasa_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "loftq_config",
    "alora_invocation_tokens",
    "megatron_config",
    "layer_replication",
    "ensure_weight_tying",
)


@dataclass
class PCConfig(LoraConfig):
    """A :class:`peft.LoraConfig` with a window, for ``peft.get_peft_model``.

    The layers are in the intact form: the base weight stays as it is, and before training the model computes the
    base's function to the bit, ``y = x Wᵀ + bias + scaling · (z Aᵀ Bᵀ − z A0ᵀ B0ᵀ)``, see :class:`ipca.nn.LinearPC`.

    >>> config = ipca.peft.PCConfig(r=16, window="minor", target_modules=["q_proj", "v_proj"])
    >>> config.r, config.lora_alpha, config.to_dict()["r"]  # the saved adapter has twice the rank
    (16, 16, 32)

    Args:
        r: components that train in each layer; 16 by default.
        window: where they start: ``"principal"``, ``"middle"``, ``"minor"``, ``0.33``, ``"start=256"``, or an
            :class:`ipca.Window`, which brings its rank. A window of the inputs, such as ``"inputs:minor"``, and
            ``"auto"`` need :func:`ipca.peft.prepare` with ``calibration=``.
        window_pattern: exceptions, ``{pattern: window}``, matched as PEFT matches ``rank_pattern``. A key that matches
            no adapted layer gives a warning.
        tol: tolerance of the decomposition, see :func:`ipca.window_svd`.
        train: ``"both"`` factors, or only ``"A"``, or only ``"B"``: the other one is frozen at its start.
        magnitude: ``"sigma"``, or a number ``m``: every component starts at the size ``m ‖W‖_F / √d``, see
            :class:`ipca.nn.LinearPC`.
        cache: a folder, or a :class:`ipca.SpectralCache`, of windows decomposed before; what is missing is added.
        progress: show a progress bar while the layers are decomposed.
        lora_alpha: default such that the scaling is 1: ``r``, or ``√r`` with ``use_rslora``.
        modules_to_save: more modules to train whole; the model's head is added, as in :func:`ipca.apply_pc`.
        init_lora_weights: True, or False for random ``A`` and ``B`` (for debugging, as in PEFT).
        others: as for LoraConfig; docs/peft-users.md has all of them. Not supported, with an error that names the
            field: DoRA and PEFT's other variants, ``lora_bias``, ``layer_replication``, ``ensure_weight_tying``, and
            initializations without a window.

    Attributes:
        records: what is known of the adapted layers.

    Raises:
        TypeError, ValueError: a field has the wrong type, is out of range, or is not supported; the message names it.
    """

    r: int = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Components that train in each layer; 16 by default"}
    )
    lora_alpha: float = field(  # type: ignore[assignment]
        default=None, metadata={"help": "scaling · r; default: scaling 1"}
    )
    # PEFT's own layers refuse a config with an active variant they do not know, and ours resolve it.
    window: Any = field(default="middle", metadata={"help": "Where the window starts", "is_lora_variant": True})
    window_pattern: dict[str, Any] = field(default_factory=dict, metadata={"help": "{pattern: window}"})
    tol: Any = field(default="default", metadata={"help": "Tolerance of the decomposition"})
    train: str = field(default="both", metadata={"help": "The factors that train: both, A or B"})
    magnitude: Any = field(default="sigma", metadata={"help": "'sigma', or the size that all components start at"})
    cache: Any = field(default=None, metadata={"help": "A folder of windows decomposed before"})
    progress: bool = field(default=True, metadata={"help": "Show a progress bar while the layers are decomposed"})

    def __post_init__(self) -> None:
        self._set_windows()
        self._set_alphas()
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {self.lora_dropout}.")
        tolerance(self.tol)
        check_factors(self.train, self.magnitude)
        self._check_supported()
        super().__post_init__()
        self.records = LayerRecords()
        # for nn.Module, so that PEFT leaves every layer to us
        self._register_custom_module({nn.Module: build_layer})  # type: ignore[dict-item]

    def _set_windows(self) -> None:
        self.rank_pattern = dict(self.rank_pattern or {})
        ranks = {f"rank_pattern[{pattern!r}]": rank for pattern, rank in self.rank_pattern.items()}
        for name, rank in ranks.items() if self.r is None else [("r", self.r), *ranks.items()]:
            if isinstance(rank, bool) or not isinstance(rank, int):
                raise TypeError(f"{name} must be an int, got {rank!r}.")
            if rank < 1:
                raise ValueError(f"{name} must be at least 1, got {rank}.")
        if isinstance(self.window, Window) and self.r not in (None, self.window.rank):
            raise ValueError(f"{self.window} has rank {self.window.rank}, but r={self.r} was given too; leave out r.")
        chosen = as_window(self.window, self.r)
        self.r, self.window = chosen.rank, chosen.text
        self.window_pattern = {
            pattern: as_pattern_window(pattern, value, self.rank_pattern.get(pattern, chosen.rank), "r")
            for pattern, value in self.window_pattern.items()
        }

    def _set_alphas(self) -> None:
        self.alpha_pattern = dict(self.alpha_pattern or {})
        if self.lora_alpha is None:
            self.lora_alpha = self._alpha_of(self.r)
            for pattern, rank in (self.rank_pattern or {}).items():
                self.alpha_pattern.setdefault(pattern, self._alpha_of(rank))
        alphas = {f"alpha_pattern[{pattern!r}]": alpha for pattern, alpha in self.alpha_pattern.items()}
        for name, alpha in {"lora_alpha": self.lora_alpha, **alphas}.items():
            if not isinstance(alpha, (int, float)):
                raise TypeError(f"{name} must be a number, got {alpha!r}.")
            if not (math.isfinite(alpha) and alpha > 0):
                raise ValueError(f"{name} must be positive, got {alpha}.")

    def _alpha_of(self, rank: int) -> float:
        """The ``lora_alpha`` of scaling 1."""
        return math.sqrt(rank) if self.use_rslora else rank

    def _check_supported(self) -> None:
        for name in _REFUSED:
            if getattr(self, name):
                raise ValueError(f"PCConfig does not support {name}; leave it out, or use peft.LoraConfig.")
        if not isinstance(self.init_lora_weights, bool):
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} is not a window; leave it out and pass window=…, such "
                "as window='principal' for PiSSA's components."
            )

    def window_of(self, path: str, rank: int) -> Window:
        """The window of the layer at ``path``, in the model that PEFT wraps."""
        key = get_pattern_key(list(self.window_pattern), path)
        return Window(self.window_pattern.get(key, self.window), rank)

    def unmatched_windows(self, paths: Iterable[str]) -> list[str]:
        """The keys of ``window_pattern`` that match none of the adapted layers at ``paths``."""
        paths = list(paths)
        return [key for key in self.window_pattern if not any(get_pattern_key([key], path) == key for path in paths)]

    def to_dict(self) -> dict[str, Any]:
        """The fields of the stock LoRA of rank ``2 r`` that state dicts hold, as ``adapter_config.json`` has them.

        ``peft.LoraConfig(**config.to_dict())`` takes them, as diffusers does when it loads an adapter.
        """
        return stock_config({f.name: getattr(self, f.name) for f in fields(LoraConfig)}).to_dict()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json`` of a stock LoRA, and ``ipca.json`` with what that cannot hold.

        PEFT calls it after it has written the weights.

        Raises:
            RuntimeError: the weights in ``save_directory`` lack the initial factors: they were gathered past the
                model's state dict, as DeepSpeed ZeRO-3 does.
        """
        values = {f.name: getattr(self, f.name) for f in fields(LoraConfig)}
        own = {name: getattr(self, name) for name in OWN_FIELDS}
        save_config(save_directory, values, own, self.records, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """The configuration of a saved adapter, with the initial factors of its layers: no SVD to resume.

        Args:
            pretrained_model_name_or_path: the folder, or the id of a repository on the Hub.
            subfolder: of it.
            kwargs: as for ``LoraConfig.from_pretrained``.

        Raises:
            ValueError: not a folder (or repository of the Hub) that holds an adapter of a PCConfig, or a damaged one.
        """
        values, records = load_config(pretrained_model_name_or_path, subfolder, **kwargs)
        config = cls(**values)
        config.records = records
        return config
