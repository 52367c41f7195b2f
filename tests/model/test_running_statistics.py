"""Running statistics of norms: a warning where training moved them and the adapter does not hold them."""

import copy
import warnings

import pytest
import torch
from torch import nn

import ipca


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 8, 3), norm, nn.Linear(8, 5)

    def forward(self, x):
        return self.out(self.norm(self.conv(x)).mean((-2, -1)))


NORMS = (
    nn.BatchNorm2d(8),
    nn.BatchNorm2d(8, affine=False),
    nn.BatchNorm2d(8, momentum=None),
    nn.SyncBatchNorm(8),
    nn.InstanceNorm2d(8, track_running_stats=True),
    nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
)


def trained(base, training=True, **options):
    model = copy.deepcopy(base)
    ipca.apply_pc(model, rank=3, targets=["conv", "out"], progress=False, **options)
    model.train(training)
    if isinstance(model.norm, nn.SyncBatchNorm):
        model.norm.num_batches_tracked += int(training)  # which has no kernel for a CPU
        model.norm.running_mean += 0.5 * training
        model.eval()
    optimizer = torch.optim.SGD(ipca.adapter_parameters(model), lr=0.1)
    for _ in range(3):
        model(torch.randn(4, 3, 6, 6)).square().mean().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: type(norm).__name__)
def test_statistics_that_moved_are_named(norm, tmp_path):
    model = trained(Net(norm))
    for save in (ipca.save_adapter, lambda model, folder: ipca.export(model, f"{folder}/export")):
        with pytest.warns(RuntimeWarning, match=r"norm: the running statistics of \w+Norm.* moved .* modules_to_save"):
            save(model, tmp_path)


@pytest.mark.parametrize(
    "norm", [*NORMS, nn.LayerNorm(4), nn.BatchNorm2d(8, track_running_stats=False), nn.InstanceNorm2d(8)]
)
def test_what_stood_still_or_is_kept_elsewhere_gives_no_warning(norm, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base = Net(norm)
        still = trained(base, training=False)
        ipca.save_adapter(still, tmp_path / "still")
        ipca.load_adapter(copy.deepcopy(base), tmp_path / "still")


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: type(norm).__name__)
def test_statistics_of_an_unloaded_model_are_those_of_its_base(norm, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base = ipca.unload(trained(Net(norm)))
        again = trained(base, training=False)
        ipca.save_adapter(again, tmp_path)
    x = torch.randn(4, 3, 6, 6)
    assert torch.equal(ipca.load_adapter(base.eval(), tmp_path)(x), again(x))


@pytest.mark.parametrize("merge", [False, True])
def test_statistics_of_a_model_that_peft_unloads_too(merge, tmp_path):
    peft = pytest.importorskip("peft")
    from ipca.peft import PCConfig

    base = Net(nn.BatchNorm2d(8))
    for training in (True, False):
        model = peft.get_peft_model(base, PCConfig(r=3, target_modules=["conv", "out"])).train(training)
        model(torch.randn(4, 3, 6, 6))
        if training:
            base = model.merge_and_unload() if merge else model.unload()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*running statistics")
        model.save_pretrained(tmp_path)


def test_a_cast_does_not_move_statistics(tmp_path):
    base = Net(nn.BatchNorm2d(8))
    base(5 + torch.randn(4, 3, 6, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ipca.save_adapter(trained(base, training=False).bfloat16(), tmp_path)


def test_statistics_in_modules_to_save_load_as_trained(tmp_path):
    peft = pytest.importorskip("peft")
    base, x = Net(nn.BatchNorm2d(8)).eval(), torch.randn(4, 3, 6, 6)
    model = trained(base, modules_to_save=["norm"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        ipca.save_adapter(model, tmp_path)
    for loaded in (ipca.load_adapter(copy.deepcopy(base), tmp_path), peft.PeftModel.from_pretrained(base, tmp_path)):
        assert (loaded.eval()(x) - model(x)).abs().max() < 1e-6


def test_a_peft_model_is_told_too(tmp_path):
    peft = pytest.importorskip("peft")
    from ipca.peft import PCConfig

    for saved in (None, ["norm"]):
        config = PCConfig(r=3, target_modules=["conv", "out"], modules_to_save=saved)
        model = peft.get_peft_model(Net(nn.BatchNorm2d(8)), config).train()
        model(torch.randn(4, 3, 6, 6))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model.save_pretrained(tmp_path)
        told = [str(w.message) for w in said if "running statistics" in str(w.message)]
        assert len(told) == (saved is None)
        assert all("norm" in text for text in told)
