"""Load a classifier's adapter with stock PEFT, in a process that cannot import ipca, and write its logits.

Usage: python stock_peft.py BASE ADAPTER CLASSES INPUTS OUTPUT

BASE is a model folder, ADAPTER the adapter folder; INPUTS, token ids and mask, is a file of safetensors. OUTPUT gets
the logits of the loaded and of the merged model.
"""

import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification


@torch.no_grad()
def main(base: str, adapter: str, classes: str, inputs: str, output: str) -> None:
    """Compute the logits of the saved inputs, before and after merging."""
    tokens = load_file(inputs)
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=int(classes))
    model = PeftModel.from_pretrained(plain, adapter).eval()
    loaded = model(**tokens).logits
    save_file({"loaded": loaded, "merged": model.merge_and_unload()(**tokens).logits}, output)


if __name__ == "__main__":
    sys.modules["ipca"] = None  # type: ignore[assignment]  # makes `import ipca` raise ImportError
    main(*sys.argv[1:])
