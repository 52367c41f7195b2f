"""Load the demo's adapter with stock PEFT, in a process that cannot import ipca, and write its logits.

Usage: python stock_peft.py BASE ADAPTER HEAD INPUTS OUTPUT

BASE is a model folder, ADAPTER the adapter folder; HEAD, a linear head, and INPUTS, token ids and mask, are safetensors
files. OUTPUT gets the logits of the loaded and of the merged model.
"""

import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel


@torch.no_grad()
def main(base: str, adapter: str, head: str, inputs: str, output: str) -> None:
    """Compute ``head(mean token state)`` of the saved inputs, before and after merging."""
    tokens, linear = load_file(inputs), load_file(head)
    mask = tokens["attention_mask"][..., None].float()

    def logits(model: torch.nn.Module) -> torch.Tensor:
        states = (model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
        return states @ linear["weight"].mT + linear["bias"]

    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), adapter).eval()
    loaded = logits(model)
    save_file({"loaded": loaded, "merged": logits(model.merge_and_unload())}, output)


if __name__ == "__main__":
    sys.modules["ipca"] = None  # type: ignore[assignment]  # makes `import ipca` raise ImportError
    main(*sys.argv[1:])
