"""A vocabulary that was resized after its base was saved: what would lose it is named, and what is advised keeps it."""

import json
import re
import warnings

import pytest
import torch

import ipca

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
IDS = torch.tensor([[1, 2, 64, 65, 3]])  # two of them are new


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2, **options))


def tied():
    return llama(tie_word_embeddings=True)


def t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=64, **sizes))


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))


def nested():
    text = {**SMALL, "num_key_value_heads": 2}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text),
        vision_config=transformers.CLIPVisionConfig(**{**SMALL, "image_size": 16, "patch_size": 8}),
        image_token_index=5,
    )
    return transformers.LlavaForConditionalGeneration(config)


NAMES = {
    llama: "model.embed_tokens, lm_head",
    tied: "model.embed_tokens, lm_head",
    t5: "shared, lm_head",
    bert: "bert.embeddings.word_embeddings",
    nested: "model.language_model.embed_tokens, lm_head",
}


def stored(make, folder, tokens=None, seed=0):
    """A model as ``from_pretrained`` reads it, its vocabulary resized to ``tokens`` with rows drawn by ``seed``."""
    if not folder.exists():
        torch.manual_seed(0)
        make().save_pretrained(folder)
    model = type(make()).from_pretrained(folder).eval()
    if tokens is not None:
        torch.manual_seed(seed)
        model.resize_token_embeddings(tokens, mean_resizing=False)
    return model


def trained(model, **options):
    ipca.apply_pc(model, **{"rank": 3, "progress": False, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def said(call):
    """What ``call`` warns of a vocabulary."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in caught if "vocabulary" in str(each.message)]


@pytest.mark.parametrize("make", NAMES)
def test_what_an_adapter_loses_is_named_before_training_and_when_it_is_saved(make, tmp_path):
    for tokens in (66, 60):
        model = stored(make, tmp_path / "base", tokens)
        message = f"{NAMES[make]}: this vocabulary has {tokens} tokens and that of '{tmp_path / 'base'}' 64, and the"
        for call in (
            lambda model=model: trained(model),
            lambda model=model: ipca.save_adapter(model, tmp_path / "adapter", overwrite=True),
            lambda model=model: ipca.export(model, tmp_path / "serve", overwrite=True),
        ):
            assert [line.startswith(message) for line in said(call)] == [True]
    same = stored(make, tmp_path / "base", 64)
    assert not said(lambda: ipca.save_adapter(trained(same), tmp_path / "other"))


def test_a_resized_base_that_was_saved_is_one_like_any_other(tmp_path):
    peft = pytest.importorskip("peft")
    for make in (llama, tied):
        folder = tmp_path / make.__name__
        stored(make, folder / "small", 66).save_pretrained(folder / "base")
        model = stored(make, folder / "base")
        assert not said(lambda model=model, folder=folder: ipca.save_adapter(trained(model), folder / "adapter"))
        loaded = ipca.load_adapter(stored(make, folder / "base"), folder / "adapter")
        assert torch.equal(logits(loaded), logits(model))
        stock = peft.PeftModel.from_pretrained(stored(make, folder / "base"), folder / "adapter")
        assert (logits(stock) - logits(model)).abs().max() < 1e-5


def test_embeddings_that_train_whole_are_in_the_adapter(tmp_path):
    model = stored(llama, tmp_path / "base", 66)
    whole = {"modules_to_save": ["embed_tokens", "lm_head"]}
    assert not said(lambda: ipca.save_adapter(trained(model, **whole), tmp_path / "adapter"))
    other = stored(llama, tmp_path / "base", 66, seed=1)
    assert (logits(other) - logits(model)).abs().max() > 1e-2
    assert torch.equal(logits(ipca.load_adapter(other, tmp_path / "adapter")), logits(model))
    part = trained(stored(llama, tmp_path / "base", 66), modules_to_save=["embed_tokens"])
    (line,) = said(lambda: ipca.save_adapter(part, tmp_path / "part"))
    assert line.startswith("lm_head: this vocabulary has 66 tokens")


@pytest.mark.parametrize("make", NAMES)
def test_loading_names_a_vocabulary_that_was_not_trained(make, tmp_path):
    ipca.save_adapter(trained(stored(make, tmp_path / "base")), tmp_path / "adapter")
    model = stored(make, tmp_path / "base", 66)
    message = f"{NAMES[make]}: this vocabulary has 66 tokens, and the adapter was trained with 64, of which it does not"
    (line,) = said(lambda: ipca.load_adapter(model, tmp_path / "adapter"))
    assert line.startswith(message)
    (line,) = said(lambda: ipca.load_adapter(model, tmp_path / "adapter"))  # resumed in place
    assert line.startswith(message)
    assert not said(lambda: ipca.load_adapter(stored(make, tmp_path / "base"), tmp_path / "adapter"))


def test_the_commands_say_so_and_an_adapter_of_an_earlier_version_does_not_know(tmp_path):
    from ipca.cli.main import main

    base, folder = tmp_path / "base", tmp_path / "adapter"
    with pytest.warns(RuntimeWarning, match="this vocabulary has 66 tokens"):
        ipca.save_adapter(trained(stored(llama, base, 66)), folder)
    for command in ("merge", "export"):
        lines = said(lambda command=command: main([command, str(base), str(folder), "-o", str(tmp_path / command)]))
        assert [line for line in lines if "has 64 tokens, and the adapter was trained with 66" in line] == lines != []
    record = json.loads((folder / "ipca.json").read_text())
    assert record.pop("vocab_size") == 66
    (folder / "ipca.json").write_text(json.dumps(record))
    assert not said(lambda: ipca.load_adapter(stored(llama, base), folder))


@pytest.mark.parametrize("make", [llama, tied])
def test_save_pretrained_writes_all_of_it(make, tmp_path):
    model = trained(stored(make, tmp_path / "base", 66))
    assert not said(lambda: model.save_pretrained(tmp_path / "whole"))
    assert (logits(stored(make, tmp_path / "whole")) - logits(model)).abs().max() < 1e-5


def test_another_base_is_compared_where_one_is_named_and_there(tmp_path):
    model = stored(llama, tmp_path / "small", 66)
    model.save_pretrained(tmp_path / "base")
    trained(model)
    folder = tmp_path / "adapter"
    assert not said(lambda: ipca.save_adapter(model, folder, base_model=str(tmp_path / "base")))
    assert not said(lambda: ipca.save_adapter(model, folder, base_model="nobody/has-this-model"))
    assert not said(lambda: ipca.save_adapter(model, folder, base_model=str(tmp_path / "gone")))
    (line,) = said(lambda: ipca.save_adapter(model, folder))
    assert re.search(r"Save the resized base with save_pretrained, .* or name these modules in modules_to_save", line)
