"""The truncated export: the nearest stock LoRA of a lower rank, and its error. AutoPeftModel on the residual base."""

import copy
import json

import pytest
import torch
import transformers
from peft import AutoPeftModel, AutoPeftModelForCausalLM, PeftModel
from torch import nn

import ipca
from ipca.io.export_formats import truncated
from tests.helpers.models import Net, adapted


class Run(Net):
    def forward(self, x):
        return self.norm(self.b(self.a(x).relu()))


def change(base: nn.Module, model: nn.Module, name: str) -> torch.Tensor:
    """The change of one weight, from what ``model`` computes with."""
    return (model.get_submodule(name).effective_weight() - base.get_submodule(name).weight).detach().double()


def loaded(base: nn.Module, folder) -> nn.Module:
    return PeftModel.from_pretrained(copy.deepcopy(base), folder)


@pytest.mark.parametrize("rank", [1, 2, 4, 5])
def test_it_is_the_best_of_its_rank_and_says_its_error(rank, tmp_path):
    base = Run()
    model = adapted(copy.deepcopy(base))
    errors = ipca.export(model, tmp_path, format="truncated", rank=rank)
    merged = loaded(base, tmp_path).merge_and_unload()
    assert errors.keys() == {"a", "b"}
    for name in errors:
        wanted = change(base, model, name)
        found = (merged.get_submodule(name).weight - base.get_submodule(name).weight).detach().double()
        S = torch.linalg.svdvals(wanted)
        best = (S[rank:].norm() / S.norm()).item()
        assert ((found - wanted).norm() / wanted.norm()).item() == pytest.approx(best, abs=1e-5)
        assert errors[name] == pytest.approx(best, abs=1e-5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (rank, rank, {})
    record = json.loads((tmp_path / "truncation.json").read_text())
    assert record == {"rank": rank, "relative_error": errors}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "truncation.json",
    ]


def test_a_layer_of_a_lower_rank_stays_exact(tmp_path):
    base = Run()
    model = ipca.apply_pc(copy.deepcopy(base), rank=4, alpha=6.0, rank_pattern={"a": 1}, progress=False)
    with torch.no_grad():
        for parameter in ipca.adapter_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    errors = ipca.export(model, tmp_path, format="truncated", rank=8)
    assert max(errors.values()) < 1e-6
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {"a": 2}
    x = torch.randn(5, 20)
    torch.testing.assert_close(loaded(base, tmp_path)(x), model(x))


def test_a_rank_above_that_of_a_weight_stays_exact(tmp_path):
    base = Run().eval()
    model = ipca.apply_pc(copy.deepcopy(base), rank=10, targets=["a", "b"], progress=False)
    with torch.no_grad():
        for parameter in ipca.adapter_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert max(ipca.export(model, tmp_path, format="truncated", rank=15).values()) < 1e-6
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (12, 12, {}, {})
    x = torch.randn(7, 20)
    assert torch.allclose(loaded(base, tmp_path)(x), model(x), atol=1e-4)


def test_modules_trained_whole_are_kept(tmp_path):
    base = Run()
    model = adapted(copy.deepcopy(base))
    ipca.export(model, tmp_path, format="truncated", rank=2)
    norm = loaded(base, tmp_path).base_model.model.norm.modules_to_save.default
    assert torch.equal(norm.weight, model.norm.weight)


def test_before_training_there_is_nothing_to_be_off(tmp_path):
    base = Run()
    model = ipca.apply_pc(copy.deepcopy(base), rank=3, progress=False)
    assert ipca.export(model, tmp_path, format="truncated", rank=2) == {"a": 0.0, "b": 0.0}
    x = torch.randn(5, 20)
    assert torch.equal(loaded(base, tmp_path)(x), base(x))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.c = nn.Embedding(30, 12), nn.Conv1d(12, 14, 3)

    def forward(self, ids):
        return self.c(self.e(ids).mT)


def test_embeddings_and_convolutions(tmp_path):
    base = Words()
    model = ipca.apply_pc(copy.deepcopy(base), rank=3, targets=["e", "c"], form="intact", progress=False)
    with torch.no_grad():
        for parameter in ipca.adapter_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.arange(20).view(2, 10)
    assert max(ipca.export(model, tmp_path / "all", format="truncated", rank=6).values()) < 1e-6
    torch.testing.assert_close(loaded(base, tmp_path / "all")(ids), model(ids))
    errors = ipca.export(model, tmp_path / "some", format="truncated", rank=4)
    merged = loaded(base, tmp_path / "some").merge_and_unload()
    for name, error in errors.items():
        before, after = base.get_submodule(name).weight, merged.get_submodule(name).weight
        wanted, found = model.get_submodule(name).weight - before, after - before
        assert ((found - wanted).norm() / wanted.norm()).item() == pytest.approx(error, abs=1e-5)
        assert error > 0.01


def test_axes_of_a_kernel_stay():
    lora_A, lora_B = torch.randn(6, 5, 3, 2), torch.randn(7, 6, 1, 1)
    tensors = {"base_model.model.c.lora_A.weight": lora_A, "base_model.model.c.lora_B.weight": lora_B}
    cut, errors = truncated(tensors, {"c": 0.5}, 4)
    A, B = cut.values()
    assert (A.shape, B.shape) == ((4, 5, 3, 2), (7, 4, 1, 1))
    wanted = 0.5 * lora_B.flatten(1) @ lora_A.flatten(1)
    off = (B.flatten(1) @ A.flatten(1) - wanted).norm() / wanted.norm()
    assert errors["c"] == pytest.approx(off.item(), rel=1e-4)


def test_embeddings_have_names_of_their_own():
    tensors = {"base_model.model.e.lora_embedding_A": torch.randn(4, 9)}
    tensors["base_model.model.e.lora_embedding_B"] = torch.randn(5, 4)
    cut, _ = truncated(tensors, {"e": 1.0}, 3)
    assert [tuple(value.shape) for value in cut.values()] == [(3, 9), (5, 3)]


def test_a_layer_without_one_pair_is_refused():
    with pytest.raises(ValueError, match="experts has no one pair of factors"):
        truncated({"base_model.model.experts.base_layer.lora_A.weight": torch.ones(2, 2)}, {"experts": 1.0}, 1)


@pytest.mark.parametrize(
    ("format", "rank", "words"),
    [
        ("truncated", None, "the format 'truncated' needs a rank"),
        ("peft", 3, "a rank is only for the format 'truncated'; got 'peft' and rank 3"),
        ("truncated", 0, "rank must be an int of at least 1, got 0"),
        ("truncated", 2.0, "rank must be an int of at least 1, got 2.0"),
        ("truncated", True, "rank must be an int of at least 1, got True"),
    ],
)
def test_a_rank_that_does_not_go_with_the_format(format, rank, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        ipca.export(adapted(Net()), tmp_path / "out", format=format, rank=rank)
    assert not (tmp_path / "out").exists()


def llama():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, vocab_size=40, num_key_value_heads=2, tie_word_embeddings=False)
    ).eval()


def test_auto_peft_model_finds_the_base(tmp_path):
    model = ipca.apply_pc(llama(), rank=4, progress=False)
    with torch.no_grad():
        for p in ipca.adapter_parameters(model):
            p.add_(0.1 * torch.randn_like(p))
    ipca.export(model, tmp_path / "x", format="residual")
    ids = torch.randint(0, 40, (2, 5))
    for auto in (AutoPeftModel, AutoPeftModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path / "x" / "adapter").eval()
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("train", ["A", "B", "both"])
def test_a_frozen_factor_that_a_stock_lora_cannot_say(train, tmp_path, recwarn):
    model = ipca.apply_pc(llama(), rank=4, targets=["q_proj"], train=train, progress=False)
    model(torch.randint(0, 40, (2, 5)))
    ipca.export(model, tmp_path / "x", format="residual")
    said = [str(w.message) for w in recwarn if "frozen" in str(w.message)]
    if train == "both":
        assert not said
    else:
        assert said[0].startswith(
            "a stock LoRA cannot say which factor is frozen, as in model.layers.0.self_attn.q_proj: "
        )
