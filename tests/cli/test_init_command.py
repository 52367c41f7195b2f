"""``ipca init`` on sharded checkpoints: tensor by tensor, the same adapter as from the model in memory."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MobileBertConfig,
    MobileBertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    WavLMConfig,
    WavLMModel,
)

import ipca
from ipca.cli.main import main
from ipca.io.model_folder import load_model
from ipca.svd.cache import SpectralCache
from tests.helpers.model_folders import contents, gpt2_config, llama_config

IDS = torch.arange(6)[None]


def init(model: Path, out: Path, *options: str) -> int:
    return main(["init", str(model), "--rank", "4", "-o", str(out), *options])


def whole(model: Path, out: Path, **options) -> dict[str, bytes]:
    """The adapter of the model in memory."""
    adapted = ipca.apply_pc(load_model(model), rank=4, form="intact", progress=False, **options)
    ipca.save_adapter(adapted, out, base_model=str(model))
    return contents(out)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


OPTIONS = {
    "default": ((), {}),
    "minor": (("--window", "minor", "--alpha", "2"), {"window": "minor", "alpha": 2}),
    "erank": (("--window", "erank"), {"window": "erank"}),
    "tol": (("--tol", "1e-9"), {"tol": 1e-9}),
    "one factor": (("--train", "A", "--magnitude", "1.5"), {"train": "A", "magnitude": 1.5}),
}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("options", "same"), OPTIONS.values(), ids=OPTIONS)
def test_the_adapter_is_the_one_of_the_whole_model(kind, options, same, request, tmp_path, monkeypatch, capsys):
    folder = request.getfixturevalue(kind)
    with monkeypatch.context() as patch:
        patch.setattr(
            "ipca.cli.init_command.load_with_missing", lambda folder: pytest.fail("the whole model was loaded")
        )
        assert init(folder, tmp_path / "out", *options) == 0
    assert "the whole model" not in capsys.readouterr().out
    assert contents(tmp_path / "out") == whole(folder, tmp_path / "whole", **same)
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_and_ipca_load_it(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    assert init(folder, tmp_path / "out") == 0
    base = logits(load_model(folder))
    assert torch.equal(logits(ipca.load_adapter(load_model(folder), tmp_path / "out")), base)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(load_model(folder), tmp_path / "out")), base)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_residual_form_is_the_one_of_the_whole_model(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    assert init(folder, tmp_path / "out", "--form", "residual") == 0
    model = ipca.apply_pc(load_model(folder), rank=4, form="residual", progress=False)
    ipca.export(model, tmp_path / "whole", format="residual")
    weights = "adapter_model.safetensors"
    ours, theirs = tmp_path / "out", tmp_path / "whole"
    assert (ours / "adapter" / weights).read_bytes() == (theirs / "adapter" / weights).read_bytes()
    config = json.loads((ours / "adapter" / "adapter_config.json").read_text())
    assert config.pop("base_model_name_or_path") == str(ours / "base")
    other = json.loads((theirs / "adapter" / "adapter_config.json").read_text())
    assert config == {name: value for name, value in other.items() if name != "base_model_name_or_path"}
    state, wanted = load_model(ours / "base").state_dict(), load_model(theirs / "base").state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], value) for name, value in wanted.items())
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in (ours / "base").iterdir()} == names
    adapted = PeftModel.from_pretrained(load_model(ours / "base"), ours / "adapter")
    tight = 3e-2 if kind == "llama" else 1e-5
    torch.testing.assert_close(logits(adapted), logits(load_model(folder)), atol=tight, rtol=0)


def test_a_single_file_is_read_too(tmp_path):
    LlamaForCausalLM(llama_config()).save_pretrained(tmp_path / "model")
    assert init(tmp_path / "model", tmp_path / "out") == 0
    assert contents(tmp_path / "out") == whole(tmp_path / "model", tmp_path / "whole")


def renamed(folder: Path, config_of: Path) -> Path:
    """The weights in ``folder`` under the configuration of another class."""
    shutil.copyfile(config_of / "config.json", folder / "config.json")
    return folder


@pytest.mark.parametrize("prefix", ["absent", "present"])
def test_the_prefix_of_the_base_model_comes_and_goes(tmp_path, prefix, capsys):
    GPT2LMHeadModel(gpt2_config()).save_pretrained(tmp_path / "head")
    GPT2Model(gpt2_config()).save_pretrained(tmp_path / "body")
    pair = (tmp_path / "body", tmp_path / "head") if prefix == "absent" else (tmp_path / "head", tmp_path / "body")
    folder = renamed(*pair)
    assert init(folder, tmp_path / "out") == 0
    assert "the whole model" not in capsys.readouterr().out
    assert contents(tmp_path / "out") == whole(folder, tmp_path / "whole")


@pytest.mark.parametrize("form", ["intact", "residual"])
def test_a_tied_weight_is_refused_before_anything_is_read(gpt2, tmp_path, capsys, form):
    assert "lm_head.weight" not in json.loads((gpt2 / "model.safetensors.index.json").read_text())["weight_map"]
    assert init(gpt2, tmp_path / "out", "--targets", "lm_head", "--form", form) == 1
    assert "its weight is tied to another module's" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def as_bin(folder: Path) -> None:
    model = load_model(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    for path in folder.glob("model*safetensors*"):
        path.unlink()


def in_float32(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))


def two_dtypes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    path = next(iter(sorted(folder.glob("*.safetensors"))))
    held = load_file(path)
    save_file({**held, "ids": torch.zeros(2, dtype=torch.float64)}, path, metadata={"format": "pt"})


REASONS = {
    "bin": (as_bin, "intact", "the folder holds no safetensors"),
    "stored": (in_float32, "residual", "is stored as BF16 and loaded as torch.float32"),
    "mixed": (two_dtypes, "intact", "its config.json does not say one dtype, and neither do its weights"),
}


@pytest.mark.parametrize(("change", "form", "reason"), REASONS.values(), ids=REASONS)
def test_what_cannot_be_streamed_is_loaded_whole_and_says_so(llama, tmp_path, capsys, change, form, reason):
    change(llama)
    assert init(llama, tmp_path / "out", "--form", form, "--json") == 0
    assert reason in json.loads(capsys.readouterr().out)["loaded_whole"]
    if form == "intact":
        assert contents(tmp_path / "out") == whole(llama, tmp_path / "whole")
        assert init(llama, tmp_path / "again") == 0
        assert f"the whole model was loaded: {reason}" in capsys.readouterr().out
    else:
        ipca.export(
            ipca.apply_pc(load_model(llama), rank=4, form="residual", progress=False),
            tmp_path / "whole",
            format="residual",
        )
        ours, theirs = contents(tmp_path / "out"), contents(tmp_path / "whole")
        weights = [name for name in theirs if name.endswith(".safetensors")]
        assert {name: ours[name] for name in weights} == {name: theirs[name] for name in weights}
        assert "base/tokenizer.json" in ours


def test_layers_that_transformers_keeps_in_float32_are_left_to_it(tmp_path, capsys):
    config = T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).half().save_pretrained(tmp_path / "t5")
    assert init(tmp_path / "t5", tmp_path / "out") == 0
    assert "the whole model was loaded: transformers keeps wo of it in float32" in capsys.readouterr().out
    assert contents(tmp_path / "out") == whole(tmp_path / "t5", tmp_path / "whole")


def test_a_weight_that_would_be_drawn_is_refused(llama, tmp_path, capsys):
    index = llama / "model.safetensors.index.json"
    record = json.loads(index.read_text())
    key = "model.layers.1.self_attn.q_proj.weight"
    path = llama / record["weight_map"].pop(key)
    index.write_text(json.dumps(record))
    held = load_file(path)
    del held[key]
    save_file(held, path, metadata={"format": "pt"})
    assert init(llama, tmp_path / "out") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{llama} holds no weight for {key.removesuffix('.weight')}, and transformers would" in error
    assert "initialize it at random; exclude it" in error
    assert init(llama, tmp_path / "out", "--exclude", key.removesuffix(".weight")) == 0


def shorten(folder: Path) -> None:
    path = max(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])


def drop_shard(folder: Path) -> None:
    max(folder.glob("*.safetensors")).unlink()


def drop_tensor(folder: Path) -> None:
    path = max(folder.glob("*.safetensors"))
    save_file({"x": torch.ones(1)}, path)


BROKEN = {
    "truncated": (shorten, "is damaged or truncated"),
    "no shard": (drop_shard, "which is not there; download it again"),
    "no tensor": (drop_tensor, "lacks the tensor"),
}


@pytest.mark.parametrize(("damage", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_one_line_and_writes_nothing(llama, tmp_path, capsys, damage, words):
    damage(llama)
    assert init(llama, tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert words in captured.err
    assert len([line for line in captured.err.splitlines() if line.startswith("ipca:")]) == 1
    assert not (tmp_path / "out").exists()


def test_what_is_done_is_said(llama, tmp_path, capsys):
    assert init(llama, tmp_path / "out", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["layers"] == 14
    assert record["paths"] == {"gram_eigh": 14}
    assert record["worst_residual"] < 1e-12
    assert record["uncertified"] == {}
    assert (record["finished_before"], record["from_cache"], record["loaded_whole"]) == (0, 0, None)
    assert init(llama, tmp_path / "text") == 0
    captured = capsys.readouterr()
    assert "14 layers adapted" in captured.out
    assert re.search(r"14 layers in \d+\.\d s: 14 by gram_eigh", captured.out)
    assert "gram_eigh=14" in captured.err  # the bar


def test_uncertified_layers_are_named(tmp_path, capsys):
    model = LlamaForCausalLM(llama_config())
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.up_proj):
                linear.weight.copy_(torch.eye(*linear.weight.shape))  # every window cuts a tie
    model.save_pretrained(tmp_path / "model")
    assert init(tmp_path / "model", tmp_path / "out") == 0
    text = capsys.readouterr().out
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"):
        assert f"model.layers.0.{name}" in text
        assert f"model.layers.1.{name}" in text
    assert "8 of 14 windows certified" in text


def test_components_that_never_train_are_named(tmp_path):
    model = LlamaForCausalLM(llama_config())
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    model.save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match="4 of 4 of model.layers.0.self_attn.o_proj.* never train, as train='A'"):
        assert init(tmp_path / "model", tmp_path / "out", "--train", "A") == 0


def test_a_frozen_factor_that_the_residual_files_cannot_hold_is_refused(llama, tmp_path, capsys):
    assert init(llama, tmp_path / "out", "--form", "residual", "--train", "B") == 1
    assert "--train B is lost with --form residual" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("by", ["option", "environment"])
def test_a_cache_is_used_where_it_is_named(llama, tmp_path, monkeypatch, capsys, decomposed, by):
    cache = tmp_path / "cache"
    options = ("--cache", str(cache))
    if by == "environment":
        monkeypatch.setenv("IPCA_CACHE", str(cache))
        options = ()
    assert init(llama, tmp_path / "a", "--no-cache") == 0
    assert not cache.exists()
    assert init(llama, tmp_path / "b", *options) == 0
    assert len(SpectralCache(cache).entries()) == 14
    before = len(decomposed)
    capsys.readouterr()
    assert init(llama, tmp_path / "c", *options) == 0
    assert "14 from the cache" in capsys.readouterr().out
    assert len(decomposed) == before
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_what_peft_refuses_is_said_before_anything_is_decomposed(tmp_path, capsys):
    sizes = {"vocab_size": 97, "hidden_size": 32, "state_size": 4, "time_step_rank": 4, "num_hidden_layers": 1}
    MambaForCausalLM(MambaConfig(**sizes)).save_pretrained(tmp_path / "model")
    command = ["init", str(tmp_path / "model"), "--rank", "2", "--quiet", "-o", str(tmp_path / "out")]
    assert main([*command, "--form", "residual"]) == 1
    assert "PEFT cannot load backbone.layers.0.mixer.out_proj" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match=r"PEFT cannot load backbone\.layers\.0\.mixer\.out_proj"):
        assert main(command) == 0


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
READ = {
    "attention": (
        lambda: WavLMModel(
            WavLMConfig(**SMALL, conv_dim=(8,), conv_stride=(4,), conv_kernel=(4,), num_feat_extract_layers=1)
        ),
        [r".*attention\.(k|out)_proj"],
        "encoder.layers.0.attention.k_proj, encoder.layers.0.attention.out_proj: the model reads the weight",
    ),
    "a head": (
        lambda: MobileBertForMaskedLM(
            MobileBertConfig(**SMALL, intermediate_size=32, embedding_size=16, intra_bottleneck_size=16, vocab_size=97)
        ),
        [r"cls\.predictions\.dense"],
        "cls.predictions.dense: the model reads the weight",
    ),
}


@pytest.mark.parametrize("kind", READ)
def test_a_layer_that_the_model_reads_and_does_not_call_is_named_before_anything_is_decomposed(kind, tmp_path, capsys):
    build, targets, words = READ[kind]
    build().save_pretrained(tmp_path / "model")
    command = ["init", str(tmp_path / "model"), "--rank", "2", "--quiet", "-o", str(tmp_path / "out")]
    assert main([*command, "--targets", *targets, "--form", "residual"]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert "--exclude them, or use the default form" in said
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match=re.escape(words)):
        assert main([*command, "--targets", *targets]) == 0


def test_a_layer_that_the_model_may_read_instead_of_calling_it_is_named(tmp_path):
    sizes = {**SMALL, "vocab_size": 97, "n_layer": 1, "n_head": 4}
    BloomForCausalLM(BloomConfig(**sizes)).save_pretrained(tmp_path / "model")
    command = ["init", str(tmp_path / "model"), "--rank", "2", "--quiet", "-o", str(tmp_path / "out")]
    with pytest.warns(UserWarning, match=r"mlp\.dense_4h_to_h: the model calls the layer or reads its weight"):
        assert main([*command, "--form", "residual"]) == 0
