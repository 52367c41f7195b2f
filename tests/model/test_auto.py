"""window="auto": the windows it takes, that the adapter needs no batches later, and what is refused."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ipca
from ipca.lab import baselines
from ipca.model import AdapterSettings, sensitivity, suggest_windows
from ipca.model.apply import adapted_layers
from ipca.model.calibration import sensitivities
from ipca.nn import LinearPC
from tests.helpers.layer_kinds import Table
from tests.helpers.models import Plain, snapshot
from tests.helpers.quantized_layers import quantized_model


@pytest.fixture
def batches():
    return [torch.randn(7, 3, 20), torch.randn(2, 3, 20)]


def starts(model):
    return {name: layer.window.index for name, layer in adapted_layers(model).items()}


def quietest(found, rank):
    sums = [found.sensitivity[s : s + rank].sum().item() for s in range(len(found.S) - rank + 1)]
    return sums.index(min(sums))


def test_each_layer_takes_its_quietest_window(batches):
    model = Plain()
    measured = sensitivity(model, batches, progress=False)
    ipca.apply_pc(model, rank=3, window="auto", rank_pattern={"b": 5}, calibration=iter(batches), progress=False)
    assert starts(model) == {name: quietest(measured[name], 5 if name == "b" else 3) for name in ("a", "b", "head")}
    assert model.b.rank == 5


def test_it_avoids_the_directions_that_inputs_use():
    """Inputs in the span of all right singular vectors but those of components 4, 5 and 6."""
    model = nn.Sequential(nn.Linear(20, 12))
    _, _, Vh = torch.linalg.svd(model[0].weight.detach())
    used = torch.cat([Vh[:4], Vh[7:]])
    inputs = [torch.randn(64, len(used)) @ used]
    ipca.apply_pc(model, rank=3, window="auto", calibration=inputs, progress=False)
    assert starts(model) == {"0": 4}


def test_suggested_windows_are_those_it_takes_and_serve_as_a_pattern(batches):
    model = Plain()
    found = suggest_windows(model, batches, rank=3, progress=False)
    ipca.apply_pc(auto := copy.deepcopy(model), rank=3, window="auto", calibration=batches, progress=False)
    assert {name: window.index for name, window in found.items()} == starts(auto)
    pattern = {name: window.text for name, window in found.items()}
    ipca.apply_pc(model, rank=3, window_pattern=pattern, progress=False)
    assert starts(model) == starts(auto)


def test_a_pattern_says_auto_of_some_layers(batches):
    model = Plain()
    found = suggest_windows(model, batches, rank=3, targets="b", progress=False)
    ipca.apply_pc(model, rank=3, window="minor", window_pattern={"b": "auto"}, calibration=batches, progress=False)
    assert starts(model) == {"a": 9, "b": found["b"].index, "head": 2}


def test_a_pattern_leaves_layers_out_of_auto():
    model = Table()
    options = {"targets": ["table", "head"], "window_pattern": {"table": "principal"}, "progress": False}
    ipca.apply_pc(model, rank=2, window="auto", calibration=[torch.randint(0, 19, (3, 7))], **options)
    assert starts(model)["table"] == 0


def test_the_adapter_is_loaded_without_batches(batches, tmp_path):
    base = Plain()
    model = ipca.apply_pc(copy.deepcopy(base), rank=3, window="auto", calibration=batches, progress=False)
    ipca.save_adapter(model, tmp_path / "adapter")
    again = ipca.load_adapter(base, tmp_path / "adapter")
    assert starts(again) == starts(model)
    assert torch.equal(again(batches[0]), model(batches[0]))


def test_a_quantized_layer_takes_the_window_of_its_original_weight(batches):
    """An original as far from the quantized weight as one may be, so that its windows are others."""
    model, plain, _ = quantized_model("int8")
    weights = {name: plain.get_submodule(name).weight.detach() for name in ("a", "b")}
    unquantized_weights = {
        name: weight + 0.8 * weight.std() * torch.randn_like(weight) for name, weight in weights.items()
    }
    names, found = ("a", "b"), {}
    for source in (None, unquantized_weights):
        measured = sensitivities(model, names, batches, unquantized_weights=source, progress=False)
        found[source is None] = {name: measured[name].quietest(3).index for name in names}
    assert found[True] != found[False]
    options = {"rank": 3, "form": "intact", "targets": names, "calibration": batches, "progress": False}
    model = ipca.apply_pc(model, window="auto", unquantized_weights=unquantized_weights, **options)
    assert starts(model) == found[False]


def test_the_method_auto_is_this_window(batches):
    model = Plain()
    found = suggest_windows(model, batches, rank=3, progress=False)
    baselines.apply(model, "auto", AdapterSettings(rank=3), calibration=batches)
    assert starts(model) == {name: window.index for name, window in found.items()}


REFUSED = [
    ({"window": "auto"}, r"window 'auto' is found from inputs .* calibration=\[…\], or another window"),
    ({"window_pattern": {"a": "auto"}}, r"window 'auto' is found from inputs"),
    ({"calibration": [torch.ones(3, 20)]}, r"calibration is for windows .* 'auto' and 'inputs:…'"),
    ({"window": "auto", "calibration": []}, r"there are no batches"),
    ({"window": "auto", "calibration": [torch.full((3, 20), torch.nan)]}, r"^a: its inputs hold NaN or Inf"),
    ({"window": "auto", "rank": 99, "calibration": [torch.ones(3, 20)]}, r"rank 99 is above its 12 singular values"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_what_is_refused_leaves_the_model_as_it_was(options, words):
    model = Plain()
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        ipca.apply_pc(model, progress=False, **{"rank": 3, **options})
    assert snapshot(model) == before


def test_where_there_are_no_inputs_the_message_says_what_to_do():
    words = r"window 'auto' is found from inputs of the model: call ipca\.apply_pc.*suggest_windows"
    with pytest.raises(ValueError, match=words):
        ipca.window_svd(torch.randn(20, 12), ipca.Window("auto", 3))
    with pytest.raises(ValueError, match=words):
        LinearPC.from_linear(nn.Linear(20, 12), ipca.Window("auto", 3))


def test_several_processes_are_refused_with_the_way_out(batches, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    model = Plain()
    with pytest.raises(ValueError, match=r"would differ between the 4 processes, .*suggest_windows.*window_pattern"):
        ipca.apply_pc(model, rank=3, window="auto", calibration=batches, progress=False)
