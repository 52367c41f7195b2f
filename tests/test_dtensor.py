"""Gathering and writing with a process group of one; what two processes do is tested in tests/engines."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import ipca
from ipca._dtensor import full, gathered, is_sharded, is_sharded_model, is_writer, part_like, plain_type, write_once
from tests.helpers.models import Plain


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_dtensor_is_seen_and_put_together(mesh):
    whole = torch.randn(5, 3)
    part = distribute_tensor(whole, mesh, [Shard(0)])
    assert is_sharded(part)
    assert not is_sharded(whole)
    assert not is_sharded(None)
    assert torch.equal(full(part), whole)
    assert full(whole) is whole
    assert torch.equal(part_like(2 * whole, part).full_tensor(), 2 * whole)
    assert part_like(part, part) is part
    assert part_like(whole, whole) is whole


def test_gathered_keeps_whole_tensors_or_nothing(mesh):
    whole = torch.randn(5, 3)
    named = [("part", distribute_tensor(whole, mesh, [Shard(1)])), ("turned", whole.mT)]
    found = gathered(named, keep=True)
    assert list(found) == ["part", "turned"]
    assert torch.equal(found["part"], whole)
    assert found["turned"].is_contiguous()
    assert gathered(named, keep=False) == {}


def test_a_sharded_model_is_known_by_its_parameters(mesh):
    model = Plain()
    assert not is_sharded_model(model)
    fully_shard(model, mesh=mesh)
    assert is_sharded_model(model)
    assert is_writer(model)
    assert type(model) is not Plain
    assert plain_type(model) is Plain


def test_an_error_of_the_writer_is_its_own(mesh):
    model = fully_shard(Plain(), mesh=mesh)

    def fail():
        raise PermissionError("no")

    with pytest.raises(PermissionError, match="no"):
        write_once(model, fail)


def test_a_sharded_model_is_saved_as_the_plain_one(mesh, tmp_path):
    torch.manual_seed(0)
    model = ipca.apply_pc(Plain(), rank=2, progress=False)
    ipca.save_adapter(model, tmp_path / "plain")
    ipca.save_adapter(fully_shard(model, mesh=mesh), tmp_path / "sharded")
    for name in ("adapter_model.safetensors", "adapter_config.json", "ipca.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "sharded" / name).read_bytes()
