import pytest
import torch
import transformers

import ipca


def llama(tied):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, vocab_size=40, num_key_value_heads=2, tie_word_embeddings=tied)
    ).eval()


def test_auto_peft_model_finds_the_base(tmp_path):
    peft = pytest.importorskip("peft")
    model = ipca.apply_pc(llama(False), rank=4, progress=False)
    with torch.no_grad():
        for p in ipca.adapter_parameters(model):
            p.add_(0.1 * torch.randn_like(p))
    ipca.export(model, tmp_path / "x", form="residual")
    ids = torch.randint(0, 40, (2, 5))
    for auto in (peft.AutoPeftModel, peft.AutoPeftModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path / "x" / "adapter").eval()
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)
