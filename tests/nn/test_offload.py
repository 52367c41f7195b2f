"""accelerate's hooks on layers: what is carried over, where offloaded weights are read."""

import pytest
import torch
from torch import nn

from ipca.nn import LinearPC
from ipca.nn.layer_kinds import base_sha256, read_layer
from ipca.nn.offload import (
    execution_device,
    has_device_hook,
    has_other_hooks,
    is_offloaded,
    loaded,
    move_device_hook,
    stored_state_dict,
    stored_tensor,
)

hooks = pytest.importorskip("accelerate.hooks")


def hooked(offload=True, **options):
    layer = nn.Linear(8, 6)
    weight, digest = layer.weight.detach().clone(), base_sha256(layer)
    hook = hooks.AlignDevicesHook(execution_device=torch.device("cpu"), offload=offload, **options)
    return hooks.add_hook_to_module(layer, hook), weight, digest


def test_an_offloaded_weight_is_read_from_where_it_is_kept():
    layer, weight, digest = hooked()
    assert layer.weight.is_meta
    assert is_offloaded(layer)
    assert torch.equal(stored_tensor(layer, "weight"), weight)
    assert torch.equal(read_layer(layer)[0], weight)
    assert base_sha256(layer) == digest
    assert torch.equal(stored_state_dict(nn.Sequential(layer))["0.weight"], weight)
    assert execution_device(layer) == torch.device("cpu")
    with loaded(layer):
        assert torch.equal(layer.weight, weight)
    assert layer.weight.is_meta


def test_a_chain_of_hooks_is_read_too():
    layer, weight, _ = hooked()
    hooks.add_hook_to_module(layer, hooks.ModelHook(), append=True)
    assert torch.equal(stored_tensor(layer, "weight"), weight)


def test_what_nobody_keeps_stays_on_the_meta_device():
    layer = nn.Linear(8, 6, bias=False, device="meta")
    assert not is_offloaded(layer)
    assert stored_tensor(layer, "weight").is_meta
    assert stored_tensor(layer, "bias") is None
    assert execution_device(layer) is None


def test_a_hook_moves_to_the_layer_in_its_place():
    plain, _, _ = hooked(offload=False)
    layer = LinearPC.from_linear(plain, rank=2)
    move_device_hook(plain, layer)
    assert layer._hf_hook is plain._hf_hook
    assert torch.equal(layer(torch.ones(1, 8)), plain(torch.ones(1, 8)))
    move_device_hook(nn.Linear(8, 6), plain)  # nothing to move


def test_hooks_of_others_are_told_from_accelerates():
    layer, _, _ = hooked(offload=False)
    assert has_device_hook(layer)
    assert not has_other_hooks(layer)
    assert not has_device_hook(nn.Linear(2, 2))
    layer.register_forward_pre_hook(lambda *args: None)
    assert has_other_hooks(layer)
    replaced = nn.Linear(2, 2)
    replaced.forward = lambda x: x
    assert has_other_hooks(replaced)
    hooks.add_hook_to_module(replaced, hooks.AlignDevicesHook(execution_device="cpu"))
    assert has_other_hooks(replaced)
