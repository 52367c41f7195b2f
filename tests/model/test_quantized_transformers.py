"""Quantized models of transformers: trained, saved, merged; stock PEFT on the same base."""

import pytest
import torch
from torch import nn

import ipca
from ipca.nn import QuantizedLinearPC
from ipca.nn.quantization import dequantize, quantization_kind, quantize_like
from tests.helpers.quantized_layers import train


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny causal model on disk, in floats."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", [4, 8])
def test_a_merged_transformers_model_is_saved_in_floats(llama, bits, tmp_path):
    from transformers import LlamaForCausalLM

    model, ids = loaded(llama, bits), torch.randint(0, 50, (2, 7))
    ipca.apply_pc(model, rank=4, form="intact", progress=False)
    after = train(model)(ids).logits
    ipca.unload(model).save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert (again(ids).logits - after).abs().max() < 1e-4


def test_what_is_left_quantized_keeps_its_configuration(llama):
    model = loaded(llama, 4)
    ipca.apply_pc(model, rank=4, form="intact", targets=["q_proj"], progress=False)
    ipca.unload(model)
    assert model.config.quantization_config is not None
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert quantization_kind(model.model.layers[0].self_attn.k_proj) == "nf4"


def test_qpissa_by_way_of_export(llama, tmp_path):
    """``Q(W_res) + B0 A0`` is nearer to the original weight than ``Q(W)``, with stock PEFT on a quantized base."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    plain = transformers.LlamaForCausalLM.from_pretrained(llama)
    weights = {}
    for name, module in plain.named_modules():
        if name.endswith("_proj"):  # two components far above the rest, as trained weights have them
            large = 0.05 * torch.randn(module.out_features, 2) @ torch.randn(2, module.in_features)
            module.weight = nn.Parameter(module.weight.detach() + large)
            weights[name] = module.weight.detach().clone()
    ipca.apply_pc(plain, rank=8, window="principal", progress=False)
    ipca.export(plain, tmp_path / "qpissa", format="residual")
    base = peft.PeftModel.from_pretrained(loaded(tmp_path / "qpissa" / "base", 4), tmp_path / "qpissa" / "adapter")
    for name, W in weights.items():
        layer = base.base_model.model.get_submodule(name)
        start = dequantize(layer.base_layer) + layer.get_delta_weight("default")
        lost = W - dequantize(quantize_like(layer.base_layer, W))
        assert (W - start).norm() < 0.8 * lost.norm()


def loaded(folder, bits):
    import transformers

    pytest.importorskip("bitsandbytes")
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
    config = transformers.BitsAndBytesConfig(**options)
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    return model.train()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_transformers_model_trains_and_stock_peft_loads_its_adapter(llama, bits, tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = loaded(llama, bits), torch.randint(0, 50, (2, 7))
    before = model(ids).logits
    ipca.apply_pc(
        model, rank=4, form="intact", unquantized_weights=ipca.load_unquantized_weights(llama), progress=False
    )
    assert torch.equal(model(ids).logits, before)
    assert len([m for m in model.modules() if isinstance(m, QuantizedLinearPC)]) == 14
    optimizer = torch.optim.AdamW(ipca.adapter_parameters(model), lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = model(ids).logits
    ipca.save_adapter(model, tmp_path)
    stock = peft.PeftModel.from_pretrained(loaded(llama, bits), tmp_path).train()
    assert (after - before).abs().max() > 0.1
    assert (stock(ids).logits - after).abs().max() < 1e-4
    assert torch.equal(ipca.load_adapter(loaded(llama, bits), tmp_path)(ids).logits, after)
