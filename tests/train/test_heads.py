"""Heads train in float32 beside a base of 16 bits, as the factors do, and stock PEFT loads them."""

import pytest
import torch
import transformers

pytest.importorskip("trl")
pytest.importorskip("datasets")

import peft

import ipca
from ipca.train import TrainSettings
from ipca.train.models import Loaded, adapt, load_model
from tests.helpers.train_runs import save_base

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {"vocab_size": 257, "pad_token_id": 256}
MODELS = {
    "a pooler and a layer": (transformers.BertModel, transformers.BertConfig(**SIZES, **TEXT)),
    "a module": (transformers.RobertaModel, transformers.RobertaConfig(**SIZES, **TEXT)),
    "a layer": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES, **TEXT)),
    "of images": (transformers.ViTModel, transformers.ViTConfig(**SIZES, image_size=16, patch_size=4)),
}
AUTO = {"of images": ("image-classification", transformers.AutoModelForImageClassification)}
SEQUENCES = ("sequence-classification", transformers.AutoModelForSequenceClassification)


def saved(kind, folder):
    save_base(*MODELS[kind], folder)
    if kind == "of images":
        return {"pixel_values": torch.randn(4, 3, 16, 16)}
    return {"input_ids": torch.randint(256, (4, 12)), "attention_mask": torch.ones(4, 12, dtype=torch.long)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_head_beside_16_bits_trains_in_float32(kind, dtype, tmp_path):
    inputs, (task, auto) = saved(kind, tmp_path / "base"), AUTO.get(kind, SEQUENCES)
    settings = TrainSettings(str(tmp_path / "base"), "data", rank=4, dtype=dtype)
    loaded = load_model(settings, task, ("a", "b"))
    own = next(loaded.model.parameters()).dtype
    inputs = {name: value.to(own) if value.is_floating_point() else value for name, value in inputs.items()}
    model = adapt(loaded, settings, task, progress=False).eval()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert {value.dtype for name, value in model.named_parameters() if name not in trained} >= {own}
    heads = {name: value for name, value in trained.items() if "modules_to_save" in name}
    before = {name: value.detach().clone() for name, value in heads.items()}
    found = model(**inputs)
    assert found.logits.dtype == own
    torch.nn.functional.cross_entropy(found.logits.float(), torch.tensor([0, 1, 1, 1])).backward()
    torch.optim.SGD(trained.values(), lr=1e-5).step()
    for name, value in heads.items():
        moved = value.grad.abs() * 1e-5 > 1e-6 * before[name].abs()  # which neither of 16 bits would tell apart
        assert ((value != before[name]) | ~moved).all()
    with torch.no_grad():
        right = model(**inputs).logits.float()
    model.save_pretrained(tmp_path / "out")
    base = auto.from_pretrained(tmp_path / "base", num_labels=2, dtype=own)
    stock = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    again = ipca.load_adapter(auto.from_pretrained(tmp_path / "base", num_labels=2, dtype=own), tmp_path / "out").eval()
    with torch.no_grad():
        for each in (stock, again):
            assert (each(**inputs).logits.float() - right).abs().max() < 40 * torch.finfo(own).eps * right.abs().max()


def test_a_head_beside_float32_is_left_as_it_is(tmp_path):
    inputs = saved("a module", tmp_path)
    settings = TrainSettings(str(tmp_path), "data", rank=4)
    loaded = load_model(settings, SEQUENCES[0], ("a", "b"))
    with torch.no_grad():
        before = loaded.model.eval()(**inputs).logits
        model = adapt(Loaded(loaded.model, loaded.processor), settings, SEQUENCES[0], progress=False).eval()
        assert torch.equal(model(**inputs).logits, before)
    assert not any(module._forward_pre_hooks for module in model.modules())
