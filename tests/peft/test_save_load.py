"""What a PCConfig's adapter leaves on disk: stock PEFT reads it, training goes on from it, damage is named."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

import ipca
from ipca.io.adapter_folder import SIDECAR
from ipca.peft import PCConfig
from tests.helpers.model_folders import contents
from tests.helpers.models import snapshot
from tests.helpers.peft_cases import off, output, saved, train, wrap
from tests.helpers.peft_models import CASES, Small, ids, llama

WEIGHTS = "adapter_model.safetensors"
ROOT = Path(__file__).parents[2]


def resume(base, folder, **options):
    """The adapter in ``folder`` on a copy of ``base``, as a PCConfig."""
    return PeftModel.from_pretrained(
        copy.deepcopy(base), folder, config=PCConfig.from_pretrained(folder), is_trainable=True, **options
    )


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """For each case what stock PEFT makes of its adapter, in one process that cannot import ipca."""
    root = tmp_path_factory.mktemp("stock")
    bases = tmp_path_factory.mktemp("bases")
    for name, case in CASES.items():
        torch.manual_seed(0)
        folder, base, x = root / name, case.build().eval(), case.x()
        config = PCConfig(r=2, window="minor", **case.options)
        if name == "llama":
            base.save_pretrained(bases / name)
            base = type(base).from_pretrained(bases / name)
        model = wrap(base, config).eval()
        train(model, x)
        model.save_pretrained(folder / "adapter")
        y = output(model, x).detach()
        flags = {"transformers": hasattr(base, "load_adapter"), "auto": name == "llama"}
        torch.save({"base": base, "x": x, "y": y, **flags}, folder / "case.pt")
    command = [sys.executable, "-m", "tests.helpers.stock_process", str(root)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_stock_peft_computes_the_same_without_ipca(name, stock):
    assert {"loaded", "merged", "low_cpu_mem_usage"} <= set(stock[name])
    assert ("transformers" in stock[name]) == (name in ("llama", "gpt2", "vit", "experts"))
    assert ("auto" in stock[name]) == (name == "llama")
    assert max(stock[name].values()) < 1e-5


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}], ids=["plain", "low_cpu_mem_usage"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_training_goes_on_as_if_never_stopped(name, dtype, options, tmp_path, monkeypatch):
    case = CASES[name]
    base, x = case.build().to(dtype), case.x()
    x = x.to(dtype) if x.is_floating_point() else x
    model = wrap(base, PCConfig(r=2, **case.options)).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    train(model, x, optimizer=optimizer)
    model.save_pretrained(tmp_path)
    for module in (ipca.nn.initialization, ipca.svd.cache):
        monkeypatch.setattr(module, "window_svd", lambda *_, **__: pytest.fail("decomposed"))
    with pytest.raises(pytest.fail.Exception):
        wrap(base, PCConfig(r=2, **case.options))
    again = resume(base, tmp_path, **options).eval()
    assert torch.equal(output(again, x), output(model, x))
    trained = [p for p in again.parameters() if p.requires_grad]
    restored = torch.optim.AdamW(trained, lr=1e-2)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(again, x, 3, restored) == train(model, x, 3, optimizer)


@pytest.mark.parametrize("name", sorted(set(CASES) - {"matrix"}))
def test_native_and_peft_read_each_others_folders(name, tmp_path):
    case = CASES[name]
    base, x = case.build().eval(), case.x()
    model = wrap(base, PCConfig(r=2, **case.options)).eval()
    train(model, x)
    model.save_pretrained(tmp_path / "peft")
    native = ipca.load_adapter(copy.deepcopy(base), tmp_path / "peft")
    assert off(output(native, x), output(model, x)) < 1e-6
    ipca.save_adapter(native, tmp_path / "native")
    again = resume(base, tmp_path / "native").eval()
    assert torch.equal(output(again, x), output(model, x))


def test_base_weights_that_peft_saves_with_an_embedding_do_no_harm(tmp_path):
    base, model, x = saved(tmp_path, llama().eval(), target_modules=["embed_tokens", "lm_head"])
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / WEIGHTS)
    native = ipca.load_adapter(copy.deepcopy(base), tmp_path)
    assert off(native(x).logits, model(x).logits) < 1e-6


def test_the_bias_of_a_head_that_peft_saves_does_no_harm(tmp_path):
    base = llama().eval()
    base.lm_head = torch.nn.Linear(base.lm_head.in_features, base.lm_head.out_features)  # as Phi's
    _, model, x = saved(tmp_path, base, target_modules=["lm_head"])
    assert "base_model.model.lm_head.base_layer.bias" in load_file(tmp_path / WEIGHTS)
    native = ipca.load_adapter(copy.deepcopy(base), tmp_path)
    assert off(native(x).logits, model(x).logits) < 1e-6


def test_a_matrix_is_pefts_alone(tmp_path):
    case = CASES["matrix"]
    base = case.build()
    wrap(base, PCConfig(r=2, **case.options)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the adapter holds inner\.weight, a bare parameter, .*only PEFT adapts"):
        ipca.load_adapter(base, tmp_path)


def test_dropout_goes_from_one_to_the_other(tmp_path):
    base, x = Small().eval(), ids()
    model = wrap(base, target_modules=["words", "a"], lora_dropout=0.25)
    train(model, x)
    model.save_pretrained(tmp_path / "peft")
    native = ipca.load_adapter(copy.deepcopy(base), tmp_path / "peft")
    assert (native.words.dropout, native.a.dropout) == (0, 0.25)
    ipca.save_adapter(native, tmp_path / "native")
    assert PCConfig.from_pretrained(tmp_path / "native").lora_dropout == 0.25


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}], ids=["plain", "low_cpu_mem_usage"])
def test_another_base_is_refused_by_the_layers_name(options, tmp_path):
    base, *_ = saved(tmp_path)
    config = PCConfig.from_pretrained(tmp_path)
    PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=config, **options)
    with torch.no_grad():
        base.b.weight[0, 0] += 1
    for given in (config, PCConfig.from_pretrained(tmp_path)):  # one that has been used, and a new one
        with pytest.raises(ValueError, match=r"^b: this is not the base weight the adapter was made on"):
            PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=given, **options)


def test_another_name_at_load(tmp_path):
    base, model, x = saved(tmp_path)
    again = resume(base, tmp_path, adapter_name="other")
    assert torch.equal(again(x), model(x))
    again.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "other" / WEIGHTS).keys() == load_file(tmp_path / WEIGHTS).keys()
    assert torch.equal(resume(base, tmp_path / "again" / "other")(x), model(x))


def test_a_state_dict_resumes_too(tmp_path):
    base, model, x = saved(tmp_path)
    again = wrap(base)
    assert set_peft_model_state_dict(again, get_peft_model_state_dict(model)).unexpected_keys == []
    assert torch.equal(again(x), model(x))
    whole = wrap(base)
    whole.load_state_dict(model.state_dict())
    assert torch.equal(whole(x), model(x))
    stock = wrap(base, LoraConfig(r=6, lora_alpha=6, target_modules=["a", "b"]))
    stock.load_state_dict(model.state_dict())
    assert off(stock(x), model(x)) < 1e-6


def test_a_state_dict_brings_the_start_it_belongs_to():
    base, x = Small(), ids()
    model, other = wrap(base, window="minor"), wrap(base, window="principal")
    train(model, x)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert torch.equal(other(x), model(x))


def test_a_state_dict_of_another_rank_is_refused_and_changes_nothing():
    base = Small()
    model, plain = wrap(base), wrap(base, LoraConfig(r=3, target_modules=["a", "b"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        RuntimeError, match=r"lora_A.* has shape \(3, 20\), but .* take \(6, 20\); .* not by a PCConfig"
    ):
        set_peft_model_state_dict(model, get_peft_model_state_dict(plain))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_transformers_own_save_and_load(tmp_path):
    base, x = llama().eval(), ids()
    model = copy.deepcopy(base)
    model.add_adapter(PCConfig(r=3, target_modules=["q_proj", "down_proj"]))
    assert torch.equal(model(x).logits, base(x).logits)
    train(model, x)
    for _ in range(2):  # the second time over files of before
        train(model, x, 1)
        model.save_pretrained(tmp_path)
        again = resume(base, tmp_path).eval()
        assert torch.equal(again(x).logits, model(x).logits)
        loaded = copy.deepcopy(base)
        loaded.load_adapter(str(tmp_path))
        assert off(loaded(x).logits, model(x).logits) < 1e-5
    going_on = copy.deepcopy(base)
    going_on.add_adapter(PCConfig.from_pretrained(tmp_path))
    set_peft_model_state_dict(going_on, load_file(tmp_path / WEIGHTS))
    assert torch.equal(going_on(x).logits, model(x).logits)


def test_the_file_is_as_large_as_a_stock_adapter_of_twice_the_rank(tmp_path):
    base, *_ = saved(tmp_path / "ours", llama(), r=8, target_modules="all-linear")
    wrap(base, LoraConfig(r=16, target_modules="all-linear")).save_pretrained(tmp_path / "stock")
    ours, stock = ((tmp_path / name / WEIGHTS).stat().st_size for name in ("ours", "stock"))
    assert abs(ours / stock - 1) < 0.01


def test_undoubled_weights_are_refused(tmp_path):
    """DeepSpeed ZeRO-3 gathers parameters past the model's state dict."""
    for name in ("embedding", "experts"):
        case = CASES[name]
        model = wrap(case.build(), PCConfig(r=2, **case.options))
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        with pytest.raises(RuntimeError, match=r"without its initial factor.*ipca\.peft\.save_gathered"):
            model.save_pretrained(tmp_path, state_dict=state)


def test_pefts_conversion_is_refused(tmp_path):
    _, model, _ = saved(tmp_path / "start")
    before = contents(tmp_path / "start")
    for arguments in ((True, None, "auto", True, str(tmp_path / "start")), ()):
        named = {} if arguments else {"path_initial_model_for_weight_conversion": str(tmp_path / "start")}
        with pytest.raises(ValueError, match="'default' fits the original base already; leave out path_initial_model"):
            model.save_pretrained(tmp_path / "x", *arguments, **named)
    assert contents(tmp_path / "start") == before
    assert not (tmp_path / "x").exists()


def test_a_folder_of_configuration_alone(tmp_path):
    config = PCConfig(r=5, window="minor", window_pattern={"a": 0.25}, target_modules=["a", "b"], lora_alpha=10)
    config.save_pretrained(tmp_path)
    read = PCConfig.from_pretrained(tmp_path)
    for name in ("r", "lora_alpha", "window", "window_pattern", "target_modules", "tol"):
        assert getattr(read, name) == getattr(config, name)
    assert peft.PeftConfig.from_pretrained(tmp_path).r == 10


def truncate(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-64])


def other_weights(folder):
    wrap(Small(), LoraConfig(r=6, target_modules=["a", "b"])).save_pretrained(folder / "other")
    (folder / WEIGHTS).write_bytes((folder / "other" / WEIGHTS).read_bytes())


def odd_rank(folder):
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 6', '"r": 5'))


DAMAGE = {
    "truncated weights": (truncate, "is damaged or truncated"),
    "weights of another adapter": (other_weights, f"is not the file that {SIDECAR} was written with"),
    "no sidecar": (lambda folder: (folder / SIDECAR).unlink(), f"has no {SIDECAR}: it is no adapter of a PCConfig"),
    "damaged sidecar": (lambda folder: (folder / SIDECAR).write_text("{"), f"{SIDECAR} is damaged"),
    "sidecar of something else": (lambda folder: (folder / SIDECAR).write_text("[]"), f"{SIDECAR} is damaged"),
    "no configuration": (lambda folder: (folder / "adapter_config.json").unlink(), r"has no adapter_config\.json"),
    "odd rank": (odd_rank, r"a LoRA of even rank; got r=5\."),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused(name, tmp_path):
    saved(tmp_path)
    damage, words = DAMAGE[name]
    damage(tmp_path)
    with pytest.raises(ValueError, match=words):
        PCConfig.from_pretrained(tmp_path)


def test_a_file_is_no_folder(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is a file, but an adapter is a folder"):
        PCConfig.from_pretrained(tmp_path / WEIGHTS)


@pytest.mark.parametrize(
    ("field", "value"),
    [("bias", "lora_only"), ("bias", "all"), ("trainable_token_indices", {"words": [3, 4]})],
    ids=str,
)
def test_what_only_peft_trains_is_refused_by_its_field(field, value, tmp_path):
    base = Small()
    model = wrap(base, PCConfig(r=3, target_modules=["a"], **{field: value}))
    model.save_pretrained(tmp_path)
    before = snapshot(base)
    with pytest.raises(ValueError, match=rf"{field} is .*, which only PEFT trains .* peft.PeftModel.from_pretrained"):
        ipca.load_adapter(base, tmp_path)
    assert snapshot(base) == before


def test_the_first_of_two_patterns_that_match_a_layer_counts_in_the_file_too(tmp_path):
    base, x = Small(), ids()
    patterns = {"rank_pattern": {"b": 2, "a|b": 4}, "alpha_pattern": {"b": 3, "a|b": 5}}
    model = wrap(base, PCConfig(r=3, target_modules=["a", "b"], **patterns))
    train(model, x)
    model.save_pretrained(tmp_path)
    assert off(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), model(x)) < 1e-5
