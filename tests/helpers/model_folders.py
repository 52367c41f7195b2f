"""Tiny sharded model folders, and the contents of a folder, for the tests of ``ipca init``."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def llama_config() -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    return LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)


def gpt2_config() -> GPT2Config:
    return GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)


def save_llama(folder: Path) -> Path:
    """Grouped queries, bfloat16, several shards, a tokenizer file; 14 layers to adapt."""
    LlamaForCausalLM(llama_config()).bfloat16().save_pretrained(folder, max_shard_size="10KB")
    (folder / "tokenizer.json").write_text("{}")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def save_gpt2(folder: Path) -> Path:
    """Conv1D layers, a tied head, several shards; 8 layers to adapt."""
    GPT2LMHeadModel(gpt2_config()).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def spoil(folder: Path) -> None:
    """Put Inf into one weight of the last shard that has any to adapt."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    key = max(key for key in index if "_proj" in key)
    held = load_file(folder / index[key])
    held[key][1, 2] = torch.inf
    save_file(held, folder / index[key], metadata={"format": "pt"})


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``; the times that a decomposition took are left out."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: re.sub(rb'"seconds": [\d.e-]+', b'"seconds": 0', data) for name, data in found.items()}
