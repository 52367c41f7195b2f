"""The start of a PCConfig through PEFT's own functions: all layers are decomposed together, or nothing is changed."""

import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

import ipca
from ipca.peft import PCConfig
from tests.helpers.models import snapshot
from tests.helpers.peft_cases import output, wrap
from tests.helpers.peft_models import CASES, EXPERTS, Small, ids, llama

TARGETS = ["q_proj", "down_proj", "embed_tokens"]
LAYERS = 5


SECOND = "PeftModel.add_adapter"


def fresh(entrance):
    """A model, with an adapter already where a second one is added."""
    first = PCConfig(r=2, target_modules=["k_proj"], progress=False)
    return get_peft_model(llama(), first).eval() if entrance == SECOND else llama().eval()


def second(model, config):
    model.add_adapter("second", config)
    model.set_adapter("second")
    return model


def in_transformers(model, config):
    model.add_adapter(config)
    return model


ENTRANCES = {
    "get_peft_model": get_peft_model,
    "mixed": lambda model, config: get_peft_model(model, config, mixed=True),
    SECOND: second,
    "inject_adapter_in_model": lambda model, config: inject_adapter_in_model(config, model),
    "transformers' add_adapter": in_transformers,
}


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def workers(monkeypatch):
    """The thread of each decomposition."""
    names, plain = [], ipca.svd.cache.window_svd

    def noted(*args, **options):
        names.append(threading.current_thread().name)
        return plain(*args, **options)

    monkeypatch.setattr(ipca.svd.cache, "window_svd", noted)
    return names


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_layers_are_decomposed_side_by_side_with_one_bar(entrance, workers, two_threads, capsys):
    model, x = fresh(entrance), ids()
    y = output(model, x)
    workers.clear()
    adapted = ENTRANCES[entrance](model, PCConfig(r=3, target_modules=TARGETS))
    assert f"Window SVD: 100%|██████████| {LAYERS}/{LAYERS}" in capsys.readouterr().err
    assert [name.rstrip("01") for name in workers] == ["ipca_"] * LAYERS
    assert torch.equal(output(adapted, x), y)


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_an_error_in_the_last_decomposition_changes_nothing(entrance, decomposed):
    model = fresh(entrance)
    with torch.no_grad():
        model.get_parameter(next(n for n, _ in model.named_parameters() if "1.mlp.down" in n))[0, 0] = torch.nan
    before, config = snapshot(model), PCConfig(r=3, target_modules=TARGETS, progress=False)
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.down_proj: the tensor holds NaN"):
        ENTRANCES[entrance](model, config)
    assert snapshot(model) == before
    assert len(decomposed) >= LAYERS
    assert (config.records.waiting, config.records.saved) == ([], {})


def test_no_layer_is_decomposed_where_one_has_too_few_singular_values(decomposed):
    model = Small()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^b: r=16 needs 16 singular values, but there are only 12"):
        get_peft_model(model, PCConfig(r=16, rank_pattern={"a": 4}, target_modules=["words", "a", "b"]))
    assert (snapshot(model), decomposed) == (before, [])


def test_an_interruption_changes_nothing(monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    model = Small()
    before = snapshot(model)
    monkeypatch.setattr(ipca.svd.cache, "window_svd", interrupt)
    with pytest.raises(KeyboardInterrupt):
        get_peft_model(model, PCConfig(r=3, target_modules=["a", "b"]))
    assert snapshot(model) == before


def test_a_cache_and_no_bar(tmp_path, decomposed, capsys):
    base, options = Small(), {"r": 3, "target_modules": ["a", "b"], "progress": False}
    config = PCConfig(**options, cache=tmp_path)
    made = [wrap(base, each) for each in (config, PCConfig(**options, cache=ipca.SpectralCache(tmp_path)))]
    assert sorted(decomposed) == [(12, 20), (20, 12)]
    for one, two in zip(*(model.state_dict().values() for model in made), strict=True):
        assert torch.equal(one, two)
    assert "Window SVD" not in capsys.readouterr().err
    assert {"cache", "progress"}.isdisjoint(config.to_dict())


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_layer(name, decomposed):
    case = CASES[name]
    base, x = case.build().eval(), case.x()
    model = wrap(base, PCConfig(r=2, **case.options))
    assert torch.equal(output(model, x), output(base, x))
    assert ((4, 48, 32) in decomposed) == (case.options.get("target_parameters") == EXPERTS)


def test_a_second_model_of_one_configuration_is_decomposed_anew(decomposed):
    config = PCConfig(r=3, target_modules=["a", "b"], progress=False)
    for base in (Small(), Small()):
        x = ids()
        assert torch.equal(wrap(base, config)(x), base(x))
    assert len(decomposed) == 4


def test_stock_configurations_are_left_to_peft(decomposed):
    model = get_peft_model(Small(), LoraConfig(r=3, target_modules=["a", "b"]))
    assert not decomposed
    assert not any("initial" in name for name, _ in model.named_buffers())
