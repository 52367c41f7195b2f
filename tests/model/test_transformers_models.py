"""save_pretrained of adapted transformers models: what from_pretrained loads, what a checkpoint resumes."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import ipca
from ipca.nn import LinearPC
from tests.helpers.models import snapshot

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SMALL, "vocab_size": 97, "num_key_value_heads": 2, "pad_token_id": 0}
IDS = {"input_ids": torch.arange(24).reshape(2, 12) + 3}
PIXELS = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)), IDS, {}


def tied():
    config = transformers.LlamaConfig(**TEXT, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config), IDS, {"rank_pattern": {"q_proj": 2}, "alpha": 6.0}


def gpt2():  # Conv1D and an embedding
    config = transformers.GPT2Config(vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config), IDS, {"targets": ["c_attn", "wpe"]}


def vit():  # keys are renamed when they are saved; a convolution; a head that trains whole
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=4, num_labels=6)
    model = transformers.ViTForImageClassification(config)
    query = "q_proj" if any(name.endswith("q_proj") for name, _ in model.named_modules()) else "query"
    return model, PIXELS, {"targets": [query, "projection"], "modules_to_save": ["classifier"]}


def mixture():
    config = transformers.Qwen3MoeConfig(
        **TEXT, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    )
    options = {"targets": ["q_proj", "experts.gate_up_proj", "experts.down_proj"]}
    return transformers.Qwen3MoeForCausalLM(config), IDS, options


def multimodal():  # transposed stacks, a vision model beside
    text = {**TEXT, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "mrope_interleaved": True}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3VLMoeConfig(
        text_config={**text, "rope_parameters": rope}, vision_config={**vision, "deepstack_visual_indexes": [0]}
    )
    return transformers.Qwen3VLMoeForConditionalGeneration(config), IDS, mixture()[2]


def batch_norm():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_labels=6)
    return transformers.ResNetForImageClassification(config), PIXELS, {"targets": ["convolution"]}


BUILDERS = (llama, tied, gpt2, vit, mixture, multimodal, batch_norm)


def adapted(build, form="intact"):
    """A base, the same base with a trained adapter, and inputs."""
    torch.manual_seed(0)
    base, inputs, options = build()
    model = copy.deepcopy(base).eval()
    ipca.apply_pc(model, **{"rank": 4, "form": form, "progress": False, **options})
    return base, model, inputs


def trained(build, form="intact"):
    base, model, inputs = adapted(build, form)
    with torch.no_grad():
        for parameter in ipca.adapter_parameters(model):
            parameter.add_(0.05 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "running_" in name:
                buffer.mul_(1.5)
    return base, model, inputs


@torch.no_grad()
def logits(model, inputs):
    return model.eval()(**inputs).logits


def same_state(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("form", ["intact", "residual"])
@pytest.mark.parametrize("build", BUILDERS)
def test_from_pretrained_loads_the_trained_function(build, form, tmp_path):
    base, model, inputs = trained(build, form)
    before, right = snapshot(model), logits(model, inputs)
    model.save_pretrained(tmp_path / "model")
    assert snapshot(model) == before
    loaded, found = type(base).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert (logits(loaded, inputs) - right).abs().max() < 1e-5
    base.save_pretrained(tmp_path / "base")  # nothing else is in the file than in one of the plain model
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("model", "base")]
    assert files[0].keys() == files[1].keys()


@pytest.mark.parametrize("build", [llama, mixture])
def test_unpickling_a_model_wraps_the_methods(build, monkeypatch, tmp_path):
    base, model, inputs = trained(build)
    pickled, fresh, cls = pickle.dumps(model), pickle.dumps(adapted(build)[1]), transformers.PreTrainedModel
    for name in ("save_pretrained", "load_state_dict"):  # as they are in a new process
        monkeypatch.setattr(cls, name, getattr(cls, name).__wrapped__)
    before = cls.save_pretrained, cls.load_state_dict
    restored = pickle.loads(pickled)
    assert cls.save_pretrained is not before[0]
    assert cls.load_state_dict is not before[1]
    for number, twin in enumerate((restored, copy.deepcopy(restored))):
        twin.save_pretrained(tmp_path / str(number))
        loaded = type(base).from_pretrained(tmp_path / str(number))
        assert (logits(loaded, inputs) - logits(model, inputs)).abs().max() < 1e-5
    model.save_pretrained(tmp_path / "checkpoint-3")
    other = pickle.loads(fresh)
    assert not any(other.load_state_dict(load_file(tmp_path / "checkpoint-3" / "model.safetensors"), strict=False))
    assert same_state(other, model)


def in_process(what, folder):
    """Run tests.helpers.pickled_models, which begins without ipca."""
    command = [sys.executable, "-m", "tests.helpers.pickled_models", what, str(folder)]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_a_process_that_unpickles_a_model_saves_the_trained_function(tmp_path):
    models = {f"{build.__name__} {form}": trained(build, form) for build in BUILDERS for form in ("intact", "residual")}
    for name, (_, model, _) in models.items():
        torch.save(model, tmp_path / f"{name}.pt")
    in_process("read", tmp_path)
    for name, (base, model, inputs) in models.items():
        base.save_pretrained(tmp_path / "base")
        for folder in (tmp_path / name, tmp_path / f"{name} copied"):
            loaded = type(base).from_pretrained(folder)
            assert (logits(loaded, inputs) - logits(model, inputs)).abs().max() < 1e-5
            files = [load_file(place / "model.safetensors") for place in (folder, tmp_path / "base")]
            assert files[0].keys() == files[1].keys()


@pytest.mark.slow
def test_a_model_of_a_notebooks_own_class_is_unpickled_and_saved_plain(tmp_path):
    in_process("write", tmp_path)
    in_process("read", tmp_path)
    assert load_file(tmp_path / "net" / "model.safetensors").keys() == {
        f"{layer}.{part}" for layer in ("body", "out") for part in ("weight", "bias")
    }


ONE_LAYER = """
import sys, torch, transformers, ipca
base = transformers.LlamaForCausalLM.from_pretrained(sys.argv[1])
layer = ipca.apply_pc(base.model.layers[0], rank=4, progress=False)
with torch.no_grad():
    layer.mlp.down_proj.lora_B.add_(0.1)
base.save_pretrained(sys.argv[2])
torch.save(base(torch.arange(12)[None]).logits, sys.argv[2] + "/y.pt")
"""


@pytest.mark.slow
def test_a_part_of_a_model_that_was_adapted_is_saved_with_the_model(tmp_path):
    base = llama()[0]
    base.save_pretrained(tmp_path / "base")
    command = [sys.executable, "-c", ONE_LAYER, str(tmp_path / "base"), str(tmp_path / "model")]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    y, ids = torch.load(tmp_path / "model" / "y.pt"), {"input_ids": torch.arange(12)[None]}
    assert (logits(type(base).from_pretrained(tmp_path / "model"), ids) - y).abs().max() < 1e-5
    assert (logits(base, ids) - y).abs().max() > 1e-2


def test_a_model_of_another_dtype_or_in_shards_keeps_its_function(tmp_path):
    base, model, inputs = trained(llama)
    model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = type(base).from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert (logits(loaded, inputs) - logits(model, inputs)).abs().max() < 0.05


def test_merged_and_disabled_models_are_saved_with_the_trained_function(tmp_path):
    base, model, inputs = trained(llama)
    right = logits(model, inputs)
    ipca.merge_adapter(model)
    with ipca.disabled(model):
        model.save_pretrained(tmp_path)
    assert (logits(type(base).from_pretrained(tmp_path), inputs) - right).abs().max() < 1e-5


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float16, 1e6), (torch.float32, torch.nan)])
def test_a_weight_that_would_not_be_finite_is_not_saved(dtype, factor, tmp_path):
    _, model, _ = trained(llama)
    model.to(dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.lora_B.mul_(factor)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: .* the weight holds NaN or Inf in torch\.float"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_push_to_hub_uploads_the_trained_function(monkeypatch):
    from transformers.utils import hub

    base, model, inputs = trained(llama)
    loaded = []

    def upload(self, working_dir, *args, **kwargs):
        loaded.append(type(base).from_pretrained(working_dir))

    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: SimpleNamespace(save=print))
    create = lambda *args, **kwargs: SimpleNamespace(repo_id="me/x")  # noqa: E731
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create)
    monkeypatch.setattr(hub, "create_repo", create, raising=False)  # of older transformers
    model.push_to_hub("me/x")
    assert (logits(loaded[0], inputs) - logits(model, inputs)).abs().max() < 1e-5


def test_plain_models_and_layers_of_a_models_own_code_are_saved_as_before(tmp_path):
    trained(llama)  # the methods are wrapped from here on

    class Own(transformers.PreTrainedModel):
        config_class = transformers.LlamaConfig

        def __init__(self, config):
            super().__init__(config)
            self.layer = LinearPC(32, 32, 4)
            self.post_init()

    own = Own(transformers.LlamaConfig())
    own.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == own.state_dict().keys()
    assert torch.equal(saved["layer.base_weight"], own.layer.base_weight)


@pytest.mark.parametrize("form", ["intact", "residual"])
@pytest.mark.parametrize("build", BUILDERS)
def test_a_checkpoint_restores_every_bit(build, form, tmp_path):
    base, model, inputs = trained(build, form)
    model.save_pretrained(tmp_path / "checkpoint-3")
    fresh = adapted(build, form)[1]
    found = fresh.load_state_dict(load_file(tmp_path / "checkpoint-3" / "model.safetensors"), strict=False)
    assert not any(found)
    assert same_state(fresh, model)
    loaded, keys = type(base).from_pretrained(tmp_path / "checkpoint-3", output_loading_info=True)
    assert not keys["missing_keys"]  # and any other reader finds the trained function there
    assert (logits(loaded, inputs) - logits(model, inputs)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2}, r"cannot resume: .*lora_..? is \(.*\) in the checkpoint and \(.*\) here; adapt the model as"),
        (
            {"targets": ["q_proj"]},
            "cannot resume: the checkpoint has .*mlp.down_proj.lora_A, the model has not; adapt the model as before",
        ),
        ({"modules_to_save": ["lm_head"]}, "cannot resume: the model has lm_head.weight, the checkpoint has not"),
        ({"alpha": 8.0}, "cannot resume model.layers.0.*alpha=4.0, this layer has 8.0"),
        (
            {"window": "principal"},
            "cannot resume model.layers.0.*from component 14 of .* layer from component 0 of its weight; adapt",
        ),
        ({"window": "inputs:start=14"}, "cannot resume model.layers.0.*from component 14 of its inputs; adapt the"),
        ({"magnitude": 1.0}, "cannot resume model.layers.0.*: the checkpoint was saved with magnitude='sigma', this"),
        ({"base": 1}, "cannot resume model.layers.0.*: its base weight is another one than the checkpoint's; load the"),
        ({"base": torch.bfloat16}, "cannot resume model.layers.0.*: its base weight is another one than the check"),
    ],
)
@pytest.mark.parametrize("form", ["intact", "residual"])
def test_a_checkpoint_of_another_adapter_is_refused(form, options, message, tmp_path):
    trained(llama, form)[1].save_pretrained(tmp_path / "checkpoint-3")
    state = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    options = {"rank": 4, "form": form, "progress": False, **options}
    base = options.pop("base", 0)
    if str(options.get("window")).startswith("inputs"):
        options["calibration"] = [torch.arange(10)[None]]
    torch.manual_seed(base if isinstance(base, int) else 0)
    model = llama()[0]
    ipca.apply_pc(model.to(base) if isinstance(base, torch.dtype) else model, **options)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(state, strict=False)
    assert snapshot(model) == before


def test_a_quantized_model_is_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    llama()[0].save_pretrained(tmp_path / "base")
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    ipca.apply_pc(model, rank=4, targets=["q_proj"], progress=False)
    with pytest.raises(ValueError, match=r"cannot fold the adapter of model.layers.0.self_attn.q_proj .*save_adapter"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("form", ["intact", "residual"])
def test_a_model_of_the_hubs_mixin_is_saved_plain(form, tmp_path):
    hub = pytest.importorskip("huggingface_hub")

    class Net(torch.nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self, width: int = 12):
            super().__init__()
            self.body, self.norm, self.out = (
                torch.nn.Linear(8, width),
                torch.nn.BatchNorm1d(width),
                torch.nn.Linear(width, 5),
            )

        def forward(self, x):
            return self.out(self.norm(self.body(x)))

    base = Net(width=16)
    model, x = ipca.apply_pc(copy.deepcopy(base), rank=3, form=form, progress=False).eval(), torch.randn(4, 8)
    with torch.no_grad():
        for parameter in ipca.adapter_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    keys = list(model.state_dict())
    model.save_pretrained(tmp_path / "model")
    base.save_pretrained(tmp_path / "base")
    assert list(model.state_dict()) == keys
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("model", "base")]
    assert files[0].keys() == files[1].keys()
    assert (Net.from_pretrained(tmp_path / "model", strict=True)(x) - model(x)).abs().max() < 1e-5
