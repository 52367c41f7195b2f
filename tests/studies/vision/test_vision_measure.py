"""The vision study's model and measures, on small random ones."""

import copy
import math
import sys

import pytest
import torch
from torch.distributions import Bernoulli, kl_divergence

from studies.vision import model as vision_model
from studies.vision.measure import Reference, bernoulli_kl, linear_cka, nearest
from studies.vision.model import maps_of, pooled, tokens_of
from studies.vision.packages import ALL, Package
from studies.vision.probe import Probe
from tests.helpers.vision_study import images, model


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(width):
    return torch.linalg.qr(normal(width, width, seed=9).double())[0].float()


def moved(size):
    found = copy.deepcopy(model())
    with torch.no_grad():
        found.backbone.encoder.layer[0].mlp.fc2.weight += size * normal(32, 128)
    return found


def test_the_map_has_eight_pixels_a_patch():
    tokens = tokens_of(model(), images().new)
    assert tokens.shape == (24, 1 + 4, 32)
    maps = maps_of(model(), tokens)
    assert maps.shape == (24, 16, 16)
    swapped = tokens[:, [0, 2, 1, 4, 3]]  # the patches of each row, from right to left
    difference = maps_of(model(), swapped)[..., :8].mean() - maps[..., 8:].mean()
    assert abs(difference) < abs(maps[..., :8].mean() - maps[..., 8:].mean()), "patches are in reading order"
    assert pooled(tokens).shape == (24, 64)


def test_batch_norms_keep_their_statistics_in_training():
    found = copy.deepcopy(model()).train()
    before = copy.deepcopy(found.decoder.state_dict())
    found.saliency(found(images().new))
    assert found.backbone.training
    for name, value in found.decoder.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_divergence_of_maps():
    before, after = 3 * normal(4, 5), 3 * normal(4, 5, seed=1)
    wanted = kl_divergence(Bernoulli(logits=before.double()), Bernoulli(logits=after.double()))
    assert torch.allclose(bernoulli_kl(before, after), wanted)
    assert not bernoulli_kl(before, before).any()
    far = bernoulli_kl(torch.tensor([200.0, -200.0]), torch.tensor([-200.0, 200.0]))
    assert far.tolist() == [200.0, 200.0], "no overflow"


def test_similarity_is_blind_to_rotations_and_scales():
    x, y = normal(50, 8), normal(50, 8, seed=1)
    assert linear_cka(x, 3 * x @ rotation(8) + 5) == pytest.approx(1)
    kernels = [z.double() - z.double().mean(0) for z in (x, y)]
    kernels = [(z @ z.mT).flatten() for z in kernels]
    assert linear_cka(x, y) == pytest.approx(torch.cosine_similarity(*kernels, dim=0).item()), "of the Gram matrices"
    assert torch.equal(nearest(x), nearest(x @ rotation(8)))
    assert nearest(x)[0].tolist() == (x @ x[0] / x.norm(dim=1)).argsort(descending=True)[1:6].tolist()


def test_a_probe_separates_and_does_not_depend_on_scales():
    labels = torch.arange(90) % 3
    x = normal(90, 6) + 4 * torch.eye(3, 6)[labels]
    found = Probe.fit(x, labels)
    assert (found(x).argmax(1) == labels).float().mean() > 0.9
    scaled = Probe.fit(100 * x + 7, labels)
    assert torch.allclose(found(x), scaled(100 * x + 7), atol=1e-3)


def test_the_base_measures_zero_and_a_moved_model_does_not():
    reference = Reference(model(), images())
    base = reference.measure(model()).means()
    for name in ("photos", "emoji", "textiles"):
        assert base[f"kl_{name}"] == 0
        assert base[f"cka_{name}"] == pytest.approx(0, abs=1e-12)
        assert base[f"neighbors_{name}"] == 0
    assert base["frozen_emoji"] == base["refit_emoji"]
    near, far = (reference.measure(moved(size)).means() for size in (0.05, 0.5))
    for name in ("kl_photos", "cka_photos", "kl_emoji", "cka_emoji", "kl_textiles", "cka_textiles"):
        assert 0 < near[name] < far[name], name
    items = reference.measure(moved(0.5)).items()
    assert items["kl_photos"].shape == (8, 1)
    assert items["kl_photos"].float().mean().item() == pytest.approx(far["kl_photos"], rel=1e-4)
    assert items["ce_new"].float().mean().item() == pytest.approx(far["ce_new"], rel=1e-4)


def test_a_broken_model_is_a_missing_number():
    found = Reference(model(), images()).measure(moved(math.nan)).means()
    assert found["ce_new"] is None
    assert found["kl_photos"] is None
    assert found["cka_photos"] is None


def test_the_loss_is_that_of_the_chosen_images():
    chosen = torch.tensor([3, 17, 40])
    with torch.no_grad():
        loss = images().loss(model(), chosen)
        logits = images().probe(pooled(model()(images().train[chosen])))
    right = logits.log_softmax(-1)[range(3), images().labels[chosen]]
    assert loss.item() == pytest.approx(-right.mean().item())


def test_an_arm_is_shown_training_images_only():
    shown = torch.cat(images().inputs("new", model()))
    assert torch.equal(shown, images().train[: len(shown)])
    with pytest.raises(ValueError, match="inputs of the 'new' task only, not of 'base'"):
        images().inputs("base", model())


def test_a_package_that_is_missing_or_another_one_is_named(tmp_path):
    package = Package("some==1", "some.whl", "0" * 64)
    with pytest.raises(FileNotFoundError, match=r"some\.whl; run: python -m studies.vision.packages"):
        package.read(tmp_path)
    (tmp_path / "some.whl").write_bytes(b"other")
    with pytest.raises(ValueError, match="is not some==1 as published"):
        package.read(tmp_path)
    with pytest.raises(ValueError, match="is not some==1 as published"):
        package.download(tmp_path)
    assert len({package.file for package in ALL}) == len(ALL) == 5


def test_a_missing_reader_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install -c constraints\.txt onnx"):
        vision_model._decoded(b"")
