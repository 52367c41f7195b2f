"""accelerate's device_map and offloading: bases that have its hooks, and adapted models that are offloaded."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from safetensors.torch import load_file

import ipca
from ipca.model.apply import adapted_layers
from tests.helpers.models import snapshot
from tests.model.test_transformers_models import gpt2, llama, logits, mixture, trained, vit

transformers = pytest.importorskip("transformers")
FORMS = ("intact", "residual")
BUILDERS = (llama, gpt2, vit, mixture)


def spread(model):
    """As ``device_map="auto"`` leaves a model on two devices."""
    return dispatch_model(model, {"": "cpu"}, force_hooks=True, main_device="cpu")


def offloaded(tmp_path, where="disk"):
    """A causal model whose first layer is in memory and whose second is on the disk, and the same all in memory."""
    llama()[0].save_pretrained(tmp_path / "base")
    device_map = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    device_map |= {"model.layers.0": "cpu", "model.layers.1": where}
    load = transformers.LlamaForCausalLM.from_pretrained
    model = load(tmp_path / "base", device_map=device_map, offload_folder=tmp_path / "offload")
    return model.eval(), load(tmp_path / "base").eval(), llama()[1]


def to_cpu(model, tmp_path):
    cpu_offload(model, execution_device=torch.device("cpu"))


def to_disk(model, tmp_path):
    disk_offload(model, tmp_path / "offload", execution_device=torch.device("cpu"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("build", BUILDERS)
def test_a_model_with_hooks_is_adapted_and_keeps_them(build, form, tmp_path):
    base, right, inputs = trained(build, form)
    ipca.save_adapter(right, tmp_path)
    model = ipca.load_adapter(spread(copy.deepcopy(base)), tmp_path)
    assert torch.equal(logits(model, inputs), logits(right, inputs))
    hooked = {name for name, module in model.named_modules() if hasattr(module, "_hf_hook")}
    layers = {name for name in adapted_layers(right) if ".experts" not in name}  # of which the module has the hook
    assert layers
    assert layers <= hooked
    model(**inputs).logits.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in ipca.adapter_parameters(model))
    plain = ipca.unload(model)
    assert (logits(plain, inputs) - logits(right, inputs)).abs().max() < 1e-5
    assert layers <= {name for name, module in plain.named_modules() if hasattr(module, "_hf_hook")}


def test_a_spread_model_starts_as_the_base():
    base, inputs, _ = llama()
    model = ipca.apply_pc(spread(copy.deepcopy(base)), rank=4, progress=False)
    assert torch.equal(logits(model, inputs), logits(base, inputs))


def test_other_hooks_beside_are_refused():
    model = spread(llama()[0])
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *args: None)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj: it has hooks or a replaced forward"):
        ipca.apply_pc(model, rank=4, progress=False)
    assert snapshot(model) == before


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_layers_are_refused_by_name(where, tmp_path):
    model, plain, inputs = offloaded(tmp_path, where)
    if where == "cpu":
        to_cpu(model.model.layers[1], tmp_path)
    ipca.save_adapter(ipca.apply_pc(plain, rank=4, progress=False), tmp_path / "adapter")
    before = snapshot(model)
    for change in (
        lambda: ipca.apply_pc(model, rank=4, progress=False),
        lambda: ipca.load_adapter(model, tmp_path / "adapter"),
    ):
        with pytest.raises(ValueError, match=r"model.layers.1.* accelerate keeps its weight .* exclude .*PCConfig"):
            change()
    with pytest.raises(ValueError, match=r"modules_to_save 'model.layers.1.mlp' cannot train: accelerate keeps"):
        ipca.apply_pc(model, rank=4, exclude=["layers.1"], modules_to_save=["model.layers.1.mlp"], progress=False)
    assert snapshot(model) == before
    right = logits(model, inputs)
    ipca.apply_pc(model, rank=4, exclude=["model.layers.1"], progress=False)  # the way out that the message names
    assert torch.equal(logits(model, inputs), right)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("offload", [to_cpu, to_disk])
@pytest.mark.parametrize("build", BUILDERS)
def test_an_adapted_model_is_offloaded(build, offload, form, tmp_path):
    base, model, inputs = trained(build, form)
    right = logits(model, inputs)
    ipca.save_adapter(model, tmp_path / "before")
    offload(model, tmp_path)
    assert (logits(model, inputs) - right).abs().max() < 1e-6
    ipca.save_adapter(model, tmp_path / "after")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    state = snapshot(model)
    for change in (
        ipca.unload,
        ipca.merge_adapter,
        lambda model: ipca.load_adapter(model, tmp_path / "before"),
        lambda model: ipca.export(model, tmp_path / "residual", format="residual"),
    ):
        with pytest.raises(ValueError, match=r"is offloaded: accelerate keeps its weights on the CPU or the disk; "):
            change(model)
    assert snapshot(model) == state
    assert not (tmp_path / "residual").exists()
    assert (logits(ipca.load_adapter(copy.deepcopy(base), tmp_path / "after"), inputs) - right).abs().max() < 1e-5


@pytest.mark.parametrize("offload", [to_cpu, to_disk])
def test_an_offloaded_model_is_saved_whole(offload, tmp_path):
    base, model, inputs = trained(llama)
    right = logits(model, inputs)
    offload(model, tmp_path)
    model.save_pretrained(tmp_path / "model")
    assert (logits(type(base).from_pretrained(tmp_path / "model"), inputs) - right).abs().max() < 1e-5


# -- inside PEFT


def peft_config(**options):
    pytest.importorskip("peft")
    from ipca.peft import PCConfig

    return PCConfig(**{"r": 4, "target_modules": "all-linear", **options})


def move_factors(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_the_window_of_an_offloaded_base_is_that_of_the_stored_weight(where, tmp_path):
    peft = pytest.importorskip("peft")
    model, plain, inputs = offloaded(tmp_path, where)
    if where == "cpu":
        to_cpu(model.model.layers[1], tmp_path)
    right = logits(model, inputs)
    tuned = peft.get_peft_model(model, peft_config())
    expected = peft.get_peft_model(plain, peft_config())
    assert torch.equal(logits(tuned, inputs), right)
    for (name, mine), theirs in zip(tuned.named_parameters(), expected.parameters(), strict=True):
        assert not mine.requires_grad or torch.equal(mine, theirs), name
    tuned.train()(**inputs).logits.square().mean().backward()
    move_factors(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert (logits(loaded, inputs) - logits(tuned, inputs)).abs().max() < 1e-5


def test_prepare_on_an_offloaded_base(tmp_path):
    peft = pytest.importorskip("peft")
    from ipca.peft import prepare

    model, _, inputs = offloaded(tmp_path)
    right = logits(model, inputs)
    config = prepare(model, peft_config(), progress=False)
    assert torch.equal(logits(peft.get_peft_model(model, config), inputs), right)


def test_an_adapter_for_an_offloaded_base_is_loaded_before_offloading(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    from ipca.peft import PCConfig

    monkeypatch.chdir(tmp_path)  # PEFT writes into it
    model, plain, inputs = offloaded(tmp_path)
    tuned = move_factors(peft.get_peft_model(copy.deepcopy(plain), peft_config()))
    tuned.save_pretrained(tmp_path / "adapter")
    before, hooks = snapshot(model), [hasattr(module, "_hf_hook") for module in model.modules()]
    for options in ({"config": PCConfig.from_pretrained(tmp_path / "adapter")}, {"is_trainable": True}):
        with pytest.raises(ValueError, match=r"accelerate keeps its weight on .* load the adapter, and offload then"):
            peft.PeftModel.from_pretrained(model, tmp_path / "adapter", **options)
        assert snapshot(model) == before
        assert [hasattr(module, "_hf_hook") for module in model.modules()] == hooks
    config = PCConfig.from_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter", config=config)  # the way out
    to_cpu(loaded, tmp_path)
    assert (logits(loaded, inputs) - logits(tuned, inputs)).abs().max() < 1e-5


@pytest.mark.parametrize("offload", [to_cpu, to_disk])
@pytest.mark.parametrize(
    ("build", "options"),
    [
        (llama, {}),
        (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
        (gpt2, {"target_modules": ["c_attn", "wpe"]}),
        (vit, {"target_modules": ["q_proj", "projection"]}),
    ],
)
def test_a_peft_model_is_offloaded(build, options, offload, tmp_path):
    peft = pytest.importorskip("peft")
    base, inputs, _ = build()
    model = move_factors(peft.get_peft_model(copy.deepcopy(base), peft_config(**options))).eval()
    right = logits(model, inputs)
    offload(model, tmp_path)
    assert (logits(model, inputs) - right).abs().max() < 1e-5
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    assert (logits(loaded, inputs) - right).abs().max() < 1e-5
    if offload is to_cpu:  # PEFT's merging looks for a file of its own behind a weight on the disk
        assert (logits(model.merge_and_unload(), inputs) - right).abs().max() < 1e-5


def test_stacks_of_offloaded_weights_are_refused_inside_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = mixture()[0]
    to_cpu(model, tmp_path)
    before = snapshot(model)
    config = peft_config(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(ValueError, match=r"experts.gate_up_proj: accelerate keeps this weight on the CPU or the disk"):
        peft.get_peft_model(model, config)
    assert snapshot(model)[0] == before[0]  # accelerate exchanges the parameters whenever a layer runs
