"""PCConfig for PEFT: a LoraConfig whose layers train a window of singular components of the base weight.

PEFT's own fields keep their names and meaning; ``r`` is the rank that trains. What is saved is a stock LoRA of rank
``2 r`` on the untouched base: ``lora_A = [A; A0]``, ``lora_B = [B, −B0]``, see :mod:`ipca.io.peft_format`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils.other import get_pattern_key
from torch import nn

from ipca.io.adapter_folder import SavedLayer, other_base, svd_record
from ipca.nn.initialization import InitialFactors, check_options, initial_factors
from ipca.peft.save_load import load_config, save_config
from ipca.svd.decompose import tolerance
from ipca.window import Window, as_window

if TYPE_CHECKING:
    from ipca.peft.layers import WindowLora

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
    """What ``peft.get_peft_model`` does to a model: as :class:`peft.LoraConfig`, with a window.

    The layers are in the intact form: the base weight stays as it is, and before training the model computes the
    base's function to the bit, ``y = x Wᵀ + bias + scaling · (z Aᵀ Bᵀ − z A0ᵀ B0ᵀ)``, see :class:`ipca.nn.LinearPC`.

    Args:
        r: components that train in each layer; 16 by default.
        window: where they start: ``"principal"``, ``"middle"``, ``"minor"``, ``0.33``, ``"start=256"``, or an
            :class:`ipca.Window`, which brings its rank.
        window_pattern: exceptions, ``{pattern: window}``, matched as PEFT matches ``rank_pattern``.
        tol: of the decomposition, see :func:`ipca.window_svd`.
        lora_alpha: default such that the scaling is 1: ``r``, or ``√r`` with ``use_rslora``.
        init_lora_weights: True, or False for random ``A`` and ``B`` (for debugging, as in PEFT).
        others: as for LoraConfig. Refused by name: DoRA and PEFT's other variants, ``lora_bias``,
            ``layer_replication``, ``ensure_weight_tying``, and initializations that are no window.

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

    def __post_init__(self) -> None:
        chosen = as_window(self.window, self.r)
        self.r, self.window = chosen.rank, chosen.text
        self.window_pattern = {key: as_window(value, None).text for key, value in self.window_pattern.items()}
        self.rank_pattern, self.alpha_pattern = dict(self.rank_pattern or {}), dict(self.alpha_pattern or {})
        if self.lora_alpha is None:
            self.lora_alpha = self._alpha_of(self.r)
            for pattern, rank in self.rank_pattern.items():
                self.alpha_pattern.setdefault(pattern, self._alpha_of(rank))
        for rank in self.rank_pattern.values():
            Window(self.window, rank)
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            check_options(form="intact", dropout=self.lora_dropout, alpha=alpha)
        tolerance(self.tol)
        self._check_unsupported()
        super().__post_init__()
        self.starts: dict[str, InitialFactors] = {}
        self.bases: dict[str, str] = {}
        self.layers: dict[str, SavedLayer] = {}
        self._register_custom_module({nn.Module: _build})  # type: ignore[dict-item]

    def _alpha_of(self, rank: int) -> float:
        return math.sqrt(rank) if self.use_rslora else rank

    def _check_unsupported(self) -> None:
        for name in _REFUSED:
            if getattr(self, name):
                raise ValueError(f"PCConfig does not support {name}; leave it out, or use peft.LoraConfig.")
        if not isinstance(self.init_lora_weights, bool):
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} is no window; leave it out and say window=…, such as "
                "window='principal' for PiSSA's components."
            )

    def window_of(self, path: str, rank: int) -> Window:
        """The window of the layer at ``path``, in the model that PEFT wraps."""
        key = get_pattern_key(list(self.window_pattern), path)
        return Window(self.window_pattern.get(key, self.window), rank)

    def stock(self) -> LoraConfig:
        """The configuration of what is saved: a stock LoRA of rank ``2 r`` with the same scaling."""
        alpha = math.sqrt(2) if self.use_rslora else 2
        values = {f.name: getattr(self, f.name) for f in fields(LoraConfig)}
        values |= {
            "r": 2 * self.r,
            "lora_alpha": alpha * self.lora_alpha,
            "rank_pattern": {key: 2 * rank for key, rank in (self.rank_pattern or {}).items()},
            "alpha_pattern": {key: alpha * value for key, value in (self.alpha_pattern or {}).items()},
            "init_lora_weights": True,
        }
        return LoraConfig(**values)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json`` of a stock LoRA, and ``ipca.json`` with what that cannot say.

        PEFT calls it after it has written the weights.

        Raises:
            RuntimeError: the weights in ``save_directory`` lack the factors at the start: whoever gathered them went
                past the model's state dict, as DeepSpeed ZeRO-3 does.
        """
        save_config(self, save_directory, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """The configuration of a saved adapter, with the factors that its layers start from: no SVD to resume.

        Raises:
            ValueError: not a folder (or repository of the Hub) that holds an adapter of a PCConfig, or a damaged one.
        """
        return load_config(cls, pretrained_model_name_or_path, subfolder, **kwargs)

    def begin(self, layer: WindowLora, adapter: str, dtype: torch.dtype) -> InitialFactors:
        """Where an adapter of ``layer`` begins: prepared or read from a file before, else decomposed now.

        Raises:
            TypeError, ValueError, RuntimeError: as :func:`ipca.nn.initial_factors`, with the layer's path; or what was
                prepared belongs to another weight.
        """
        path, rank, scaling = layer.path, layer.r[adapter], layer.scaling[adapter]
        digest, start = self.check_base(layer), self.starts.pop(path, None)
        matrix = layer.base_matrix()
        try:
            if start is None:
                window = self.window_of(path, rank)
                options = {"scaling": scaling, "form": "intact", "adapter_dtype": dtype, "tol": self.tol}
                start = initial_factors(matrix, window, digest=digest, **options)
        except ValueError as error:
            raise ValueError(f"{path}: {error} Or give it another rank in rank_pattern, or exclude it.") from None
        except (TypeError, RuntimeError) as error:
            raise type(error)(f"{path}: {error}") from None
        self.layers[path] = SavedLayer(
            kind=layer.kind,
            shape=tuple(matrix.shape),
            start=start.window.index,
            rank=rank,
            alpha=scaling * rank,
            form="intact",
            dropout=0.0 if layer.kind == "embedding" else self.lora_dropout,  # PEFT drops nothing of indices
            base_sha256=digest,
            svd=None if start.svd is None else svd_record(start.svd),
        )
        return start

    def check_base(self, layer: WindowLora) -> str:
        """The hash of the base weight of ``layer``.

        Raises:
            ValueError: what was prepared, or read from a file, belongs to another weight.
        """
        digest, start = layer.base_sha256(), self.starts.get(layer.path)
        known = self.bases.get(layer.path) or (start and start.base_sha256)
        if known and known != digest:
            raise ValueError(other_base(layer.path, known, digest) + ".")
        return digest

    def on_save(self, path: str) -> Callable[[], None]:
        """What to call when the factors of the layer at ``path`` enter a state dict.

        Its record is then the one that :meth:`save_pretrained` writes, also where two models share this object.
        """
        return partial(self._remember, path, self.layers.get(path))

    def _remember(self, path: str, layer: SavedLayer | None) -> None:
        if layer is not None:
            self.layers[path] = layer


def config_of(model: nn.Module, adapter_name: str) -> PCConfig:
    """The configuration of an adapter.

    Raises:
        TypeError: ``model`` is no PeftModel.
        ValueError: no adapter of that name, or not one of a PCConfig.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"expected a PeftModel, got a {type(model).__name__}; give the model inside the wrapper.")
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, PCConfig):
        names = [name for name, other in model.peft_config.items() if isinstance(other, PCConfig)]
        raise ValueError(f"{adapter_name!r} is no adapter of a PCConfig; those are {', '.join(names) or '(none)'}.")
    return config


def _build(target: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module:
    """As :func:`ipca.peft.dispatch.build`, whose module needs PCConfig's."""
    from ipca.peft.dispatch import build

    return build(target, adapter_name, **kwargs)
