"""Adapters of a PCConfig among others, with the options of PEFT: switched, mixed in a batch, copied, deleted."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from torch import nn

from ipca.peft import PCConfig
from tests.helpers.peft_cases import off, output, randomize, train, wrap
from tests.helpers.peft_models import CASES, Small, ids, llama

ALL = ["words", "a", "b"]


def three(base, x, targets=ALL):
    """A PeftModel with two windows and a plain LoRA, all trained, and the output of each."""
    model = wrap(base, target_modules=targets)
    model.add_adapter("minor", PCConfig(r=2, window="minor", target_modules=targets[:2]))
    model.add_adapter("default_plain", LoraConfig(r=3, target_modules=targets))
    randomize(model)
    outputs = {"__base__": base(x)}
    for name in ("default", "minor", "default_plain"):
        model.set_adapter(name)
        train(model, x)
        outputs[name] = model(x).detach()
    return model.eval(), outputs


def test_several_adapters_in_one_model(tmp_path):
    base, x = Small(), ids()
    model, outputs = three(base, x)
    for name in ("minor", "default", "default_plain", "minor"):
        model.set_adapter(name)
        assert torch.equal(model(x), outputs[name])
        with model.disable_adapter():
            assert torch.equal(model(x), outputs["__base__"])
    model.save_pretrained(tmp_path)
    for name, folder in (("default", ""), ("minor", "minor"), ("default_plain", "default_plain")):
        stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder)
        assert off(stock(x), outputs[name]) < 1e-6
    assert not (tmp_path / "default_plain" / "ipca.json").exists()


def test_a_second_window_from_a_file(tmp_path):
    base, x = Small(), ids()
    model, outputs = three(base, x)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=PCConfig.from_pretrained(tmp_path))
    again.add_adapter("minor", PCConfig.from_pretrained(tmp_path / "minor"))
    again.load_adapter(tmp_path / "minor", "minor")
    again.load_adapter(tmp_path / "default_plain", "plain")
    for name, known in (("minor", "minor"), ("plain", "default_plain"), ("default", "default")):
        again.set_adapter(name)
        assert torch.equal(again(x), outputs[known])


@pytest.mark.parametrize("training_mode", [False, True])
def test_two_active_adapters_add_up(training_mode):
    base, x = Small(), torch.randn(6, 20)
    model, _ = three(base, ids())
    layer, change = model.base_model.model.a, {}
    model.train(training_mode)
    for name in ("default", "minor", "default_plain"):
        model.set_adapter(name)
        change[name] = layer(x) - base.a(x)
    model.base_model.set_adapter(["minor", "default", "default_plain"])
    assert off(layer(x) - base.a(x), sum(change.values())) < 1e-5


def test_each_row_of_a_batch_has_its_adapter():
    base, x = Small().eval(), ids()
    model, outputs = three(base, x)
    names = ["minor", "__base__", "default"]
    rows = model(x, adapter_names=names)
    assert all(off(rows[row], outputs[name][row]) < 1e-6 for row, name in enumerate(names))
    assert torch.equal(rows[1], outputs["__base__"][1])
    rows = model(x, adapter_names=["default_plain", "default", "default_plain"])
    assert off(rows[1], outputs["default"][1]) < 1e-6
    assert off(rows[[0, 2]], outputs["default_plain"][[0, 2]]) < 1e-6


@pytest.mark.parametrize("name", ["conv2d", "embedding", "llama"])
def test_a_batch_for_other_layers(name):
    case = CASES[name]
    base, x = case.build().eval(), case.x()
    model = wrap(base, PCConfig(r=2, **case.options)).eval()
    train(model, x)
    names = ["default", *["__base__"] * (len(x) - 1)]
    rows = model(x, adapter_names=names)
    rows = rows if isinstance(rows, torch.Tensor) else rows.logits
    assert off(rows[0], output(model, x)[0]) < 1e-5
    assert torch.equal(rows[1:], output(base, x)[1:])


@pytest.mark.parametrize("second", [PCConfig, LoraConfig])
def test_a_deleted_adapter_leaves_nothing_behind(second):
    base, x = Small(), ids()
    model, outputs = three(base, x)
    model.delete_adapter("minor")
    assert not [name for name in model.state_dict() if "minor" in name]
    model.add_adapter("minor", second(r=2, target_modules=ALL))
    model.set_adapter("minor")
    randomize(model) if second is LoraConfig else None
    assert torch.equal(model(x), outputs["__base__"]) == (second is PCConfig)
    rank = 4 if second is PCConfig else 2
    shapes = {tuple(tensor.shape) for name, tensor in model.state_dict().items() if "A.minor" in name}
    assert shapes == {(rank, 30), (rank, 20), (rank, 12)}
    model.set_adapter("default")
    assert torch.equal(model(x), outputs["default"])


PATTERNS = {
    "rank_pattern": {r"layers\.1\.self_attn\.v_proj": 2, "q_proj": 5},
    "window_pattern": {"q_proj": "minor", r"layers\.0\.mlp\.down_proj": "start=3", "down_proj": 0.25},
    "target_modules": ["q_proj", "v_proj", "down_proj"],
}
INDICES = {"q_proj": [27, 27], "v_proj": [6, 7], "down_proj": [3, 5]}


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_of_rank_alpha_and_window(rslora, tmp_path):
    base, x = llama().eval(), ids()
    options = {**PATTERNS, "use_rslora": rslora, "alpha_pattern": {"down_proj": 6.5}}
    model = wrap(base, r=3, **options).eval()
    config = model.peft_config["default"]
    for part, indices in INDICES.items():
        found = [layer.start for path, layer in config.records.saved.items() if path.endswith(part)]
        assert found == indices
    scalings = {m.path.rpartition(".")[2]: m.scaling["default"] for m in model.modules() if hasattr(m, "path")}
    assert scalings == {"q_proj": 1, "v_proj": 1, "down_proj": pytest.approx(6.5 / (3**0.5 if rslora else 3))}
    train(model, x)
    model.save_pretrained(tmp_path)
    assert off(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x).logits, model(x).logits) < 1e-5
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=PCConfig.from_pretrained(tmp_path))
    assert torch.equal(again(x).logits, model(x).logits)
    read = again.peft_config["default"]
    for name in ("r", "rank_pattern", "window", "window_pattern", "use_rslora"):
        assert getattr(read, name) == getattr(config, name)
    for name in ("lora_alpha", "alpha_pattern"):
        assert getattr(read, name) == pytest.approx(getattr(config, name))


OPTIONS = {
    "modules_to_save": {"modules_to_save": ["norm", "lm_head"]},
    "tokens": {"trainable_token_indices": [3, 5]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    "layers_to_transform": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "exclude_modules": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "regular expression": {"target_modules": r".*\.0\..*(q|v)_proj"},
    "sequence classification": {"task_type": "SEQ_CLS"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_pefts_own_options(name, tmp_path):
    base, x = llama().eval(), ids()
    if name == "sequence classification":
        base = transformers.LlamaForSequenceClassification(base.config).eval()
        base.config.pad_token_id = 0
    model = wrap(base, **{"target_modules": ["q_proj"], **OPTIONS[name]}).eval()
    assert torch.equal(model(x).logits, base(x).logits)
    train(model, x)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    again = PeftModel.from_pretrained(
        copy.deepcopy(base), tmp_path, config=PCConfig.from_pretrained(tmp_path), is_trainable=True
    ).eval()
    assert off(stock(x).logits, model(x).logits) < 1e-5
    assert torch.equal(again(x).logits, model(x).logits)
    assert [(n, p.requires_grad) for n, p in again.named_parameters()] == [
        (n, p.requires_grad) for n, p in model.named_parameters()
    ]
    assert off(model.merge_and_unload()(x).logits, stock(x).logits) < 1e-5


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_train_are_saved(bias, tmp_path):
    base, x = Small(), ids()
    model = wrap(base, bias=bias)
    train(model, x)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=PCConfig.from_pretrained(tmp_path))
    assert torch.equal(again(x), model(x))
    assert not torch.equal(again.base_model.model.a.bias, base.a.bias)


def test_copies_and_pickles_are_models_of_their_own(tmp_path):
    base, x = Small(), ids()
    model, outputs = three(base, x)
    model.set_adapter("default")
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(twin(x), outputs["default"])
        train(twin, x)
        assert not torch.equal(twin(x), outputs["default"])
        assert torch.equal(model(x), outputs["default"])
        twin.save_pretrained(tmp_path / "twin")
        assert off(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "twin")(x), twin(x)) < 1e-6


def test_two_models_may_share_one_config(tmp_path):
    config, x = PCConfig(r=3, target_modules=["a", "b"]), ids()
    bases = [Small(), Small()]
    models = [wrap(base, config) for base in bases]
    for place, (base, model) in enumerate(zip(bases, models, strict=True)):
        assert torch.equal(model(x), base(x))
        train(model, x)
        model.save_pretrained(tmp_path / str(place))
    for place, (base, model) in enumerate(zip(bases, models, strict=True)):
        folder = tmp_path / str(place)
        again = PeftModel.from_pretrained(base, folder, config=PCConfig.from_pretrained(folder))
        assert torch.equal(again(x), model(x))


def test_a_larger_model_of_the_same_config_is_not_recorded(tmp_path):
    config = PCConfig(r=3, target_modules=["0", "1", "2"])
    chains = [nn.Sequential(*(nn.Linear(9, 9) for _ in range(length))) for length in (3, 2)]
    _, model = (wrap(chain, config) for chain in chains)
    model.save_pretrained(tmp_path)
    assert list(PCConfig.from_pretrained(tmp_path).records.saved) == ["0", "1"]


def test_inject_adapter_in_model():
    base, x = Small(), ids()
    model = inject_adapter_in_model(PCConfig(r=3, target_modules=ALL), copy.deepcopy(base))
    assert torch.equal(model(x), base(x))
    train(model, x)
    again = inject_adapter_in_model(PCConfig(r=3, target_modules=ALL), copy.deepcopy(base))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
