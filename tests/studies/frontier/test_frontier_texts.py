"""Token ids: samples of a model, sentences of unequal length."""

import copy

import pytest
import torch
import torch.nn.functional as F

from studies.frontier.measure import Reference
from studies.frontier.texts import IGNORED, Texts, draw_samples
from tests.helpers.frontier_study import VOCABULARY, model

PADDING = 0


def test_samples_are_drawn_from_the_model():
    first, again = (draw_samples(model(), seed=3, count=4, length=10) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (4, 10)
    assert not torch.equal(first, draw_samples(model(), seed=4, count=4, length=10))
    assert (first[:, 0] == model().config.bos_token_id).all()
    with torch.no_grad():
        logits = model()(input_ids=first).logits[:, :-1]
    likelihood = logits.log_softmax(-1).gather(-1, first[:, 1:, None]).mean()
    uniform = -torch.log(torch.tensor(61.0))
    assert likelihood > uniform, "tokens that the model finds likely"


def test_a_sample_ends_with_the_models_end_token():
    model().config.eos_token_id, before = 2, model().config.eos_token_id
    found = draw_samples(model(), seed=3, count=64, length=24, padding=PADDING)
    model().config.eos_token_id = before
    ends = (found[:, 1:] == 2).int().argmax(1) + 1
    ended = (found[:, 1:] == 2).any(1)
    assert ended.any()
    assert not ended.all()
    for line, end, done in zip(found, ends, ended, strict=True):
        if done:
            assert not line[end + 1 :].any(), "padding"


@pytest.fixture
def padded():
    """Sentences of 3 to 8 tokens."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (6, 8), generator=draw)
    for line, length in zip(ids, (3, 4, 5, 6, 7, 8), strict=True):
        line[length:] = PADDING
    return Texts(ids, ids, {"samples": ids}, PADDING)


def test_padding_is_not_trained_on(padded):
    labels = padded.labels(torch.tensor([0, 5]))
    assert (labels[0] == IGNORED).tolist() == [False] * 3 + [True] * 5
    assert torch.equal(labels[1], padded.train[5])


@torch.no_grad()
def test_padding_is_not_measured(padded):
    """As if each sentence were measured by itself."""
    other = copy.deepcopy(model())
    other.model.layers[0].mlp.down_proj.weight += 0.1
    found = Reference(model(), padded).measure(other)
    entropies, divergences = [], []
    for line in padded.new:
        ids = line[line != PADDING][None]
        tuned, base = (m(input_ids=ids).logits[0, :-1].log_softmax(-1) for m in (other, model()))
        entropies.append(F.nll_loss(tuned, ids[0, 1:], reduction="sum"))
        divergences.append(F.kl_div(tuned, base, reduction="sum", log_target=True))
    count = 2 + 3 + 4 + 5 + 6 + 7
    assert found.means()["ce_new"] == pytest.approx(float(sum(entropies)) / count, rel=1e-5)
    assert found.means()["kl_samples"] == pytest.approx(float(sum(divergences)) / count, rel=1e-4)
