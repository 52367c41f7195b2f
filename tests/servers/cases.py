"""A small LLaMA with a tokenizer, its adapters as the command exports them, and what the live models compute."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, normalizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import ipca
from ipca.cli.main import main
from ipca.peft import PCConfig

BASE, CASES, WANTED = "base", "cases.json", "wanted.npz"
VOCAB, LENGTH = 512, 32
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
NATIVE = {
    "not trained": {"rank": 8},
    "uniform rank": {"rank": 8},
    "default rank": {"rank": 16},
    "rank_pattern": {"rank": 8, "rank_pattern": {"q_proj": 4, "down_proj": 12}},
    "alpha_pattern": {"rank": 8, "alpha_pattern": {"v_proj": 24.0, r"model\.layers\.1\.mlp\.up_proj": 2.0}},
    "fractional alpha": {"rank": 8, "alpha": 4.5},
    "embeddings": {"rank": 8, "targets": [*ATTENTION, "embed_tokens"]},
    "output head": {"rank": 8, "targets": [*ATTENTION, "lm_head"]},
    "some layers": {"rank": 8, "targets": [r"model\.layers\.0\.mlp\.up_proj", r"model\.layers\.1\.self_attn\.q_proj"]},
}
"""Adapters of ``apply_pc``, by name."""
IN_PEFT = {
    "PCConfig": {"r": 8, "target_modules": LINEAR},
    "rsLoRA": {"r": 8, "target_modules": LINEAR, "use_rslora": True},
    "rsLoRA, rank_pattern": {"r": 8, "target_modules": LINEAR, "use_rslora": True, "rank_pattern": {"q_proj": 4}},
}
"""Adapters of a ``PCConfig``, by name."""


def write_cases(folder: Path) -> list[str]:
    """Write base, adapters in both formats and the live models' log-probabilities into ``folder``; returns the names.

    ``folder/FORMAT/NUMBER`` is the adapter of the name with that number in ``cases.json``, as ``ipca export`` wrote it;
    ``wanted.npz`` holds ``(positions, words)`` by name, and the base's as ``"base"``.
    """
    base = llama()
    base.save_pretrained(folder / BASE)
    tokenizer().save_pretrained(folder / BASE)
    ids = torch.randint(3, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(2))
    names, wanted = [*NATIVE, *IN_PEFT], {"base": log_probabilities(base, ids)}
    for number, name in enumerate(names):
        saved = folder / "saved" / str(number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of servers, which do not read these folders
            if name in NATIVE:
                model = ipca.apply_pc(copy.deepcopy(base), progress=False, **NATIVE[name])
                perturb(model, 0.0 if name == "not trained" else 0.05)
                ipca.save_adapter(model, saved)
            else:
                model = get_peft_model(copy.deepcopy(base), PCConfig(task_type="CAUSAL_LM", **IN_PEFT[name]))
                perturb(model, 0.05)
                model.save_pretrained(str(saved))
        wanted[name] = log_probabilities(model, ids)
        for format in ("serve", "mlx"):
            export(folder, saved, format, folder / format / str(number))
    np.savez(folder / WANTED, **wanted)
    (folder / CASES).write_text(json.dumps({"ids": ids[0].tolist(), "names": names}))
    return names


def export(folder: Path, adapter: Path, format: str, out: Path) -> None:
    """What a user would type.

    Raises:
        RuntimeError: the command failed; it has said why on stderr.
    """
    words = ["export", str(folder / BASE), str(adapter), "--format", format, "-o", str(out), "--quiet"]
    if main(words):
        raise RuntimeError(f"ipca {' '.join(words)} failed")


def llama() -> LlamaForCausalLM:
    """Two blocks with heads of 32, the least that vLLM's kernels take."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "tie_word_embeddings": False, "max_position_embeddings": 256}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.06, "vocab_size": VOCAB}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ends)).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Pairs of letters, letters and bytes, in the way of LLaMA 2's, which llama.cpp's converter reads."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [(a, b) for a in letters for b in letters[1:]][: VOCAB - len(words)]
    words += [a + b for a, b in merges]
    vocabulary = {word: number for number, word in enumerate(words)}
    found = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    found.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=found, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@torch.no_grad()
def perturb(model: nn.Module, by: float) -> None:
    """Move what trains, as training would."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(by * torch.randn_like(parameter))


@torch.no_grad()
def log_probabilities(model: nn.Module, ids: torch.Tensor) -> np.ndarray:
    """``(positions, words)``."""
    found: np.ndarray = model(input_ids=ids).logits[0].double().log_softmax(-1).float().numpy()
    return found
