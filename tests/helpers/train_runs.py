"""Tiny models, tokenizers and files for the tests of ``ipca train``."""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
TEXT = "".join(f"The {k}th sentence says that {k} plus {k} is {2 * k}. " for k in range(400))
KEPT = "".join(f"Nothing of line {k} shall be forgotten, and {k * k} is its square.\n" for k in range(60))


def tiny():
    """The module of the examples' model and tokenizer."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import tiny
    finally:
        sys.path.pop(0)
    return tiny


def save_language_model(folder: Path, chat: bool = True) -> Path:
    """A Llama of 64 × 64 with a tokenizer of bytes."""
    made = tiny()
    made.tiny_model().save_pretrained(folder)
    tokenizer = made.tiny_tokenizer()
    if not chat:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


def save_base(model: type, config, folder: Path) -> Path:
    """A model of the class with the same weights every time, and the tokenizer of bytes or an image processor."""
    torch.manual_seed(0)
    model(config).save_pretrained(folder)
    if hasattr(config, "image_size"):
        from transformers import ViTImageProcessorPil

        size = {"height": config.image_size, "width": config.image_size}
        ViTImageProcessorPil(size=size).save_pretrained(folder)
    else:
        tiny().tiny_tokenizer().save_pretrained(folder)
    return folder


def save_encoder(folder: Path) -> Path:
    """A DistilBERT of 32 × 32 with the same tokenizer."""
    from transformers import DistilBertConfig, DistilBertModel

    config = DistilBertConfig(vocab_size=257, dim=32, n_layers=2, n_heads=2, hidden_dim=64, pad_token_id=256)
    return save_base(DistilBertModel, config, folder)


def save_vit(folder: Path) -> Path:
    """A ViT of 32 × 32 for images of 16 × 16."""
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return save_base(ViTModel, ViTConfig(**sizes, image_size=16, patch_size=4), folder)


def save_images(folder: Path, classes=("dark", "light"), count=12) -> Path:
    """Images of 16 × 16, one gray a class."""
    from PIL import Image

    for level, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            Image.new("RGB", (16, 16), (40 + 150 * level + k,) * 3).save(folder / name / f"{k}.png")
    return folder
