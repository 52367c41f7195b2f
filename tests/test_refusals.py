"""The check that refused calls leave their models as they were sees each kind of change."""

import pytest
import torch
from torch import nn

from tests.helpers import refusals


def value(model):
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-6


def other_parameter(model):
    model[0].weight = nn.Parameter(model[0].weight.detach())


def other_module(model):
    model[0] = nn.Linear(3, 3)


def trains(model):
    model[0].weight.requires_grad_(False)


def mode(model):
    model.eval()


@pytest.mark.parametrize("change", [value, other_parameter, other_module, trains, mode])
def test_a_refused_call_that_changed_its_model_is_seen(change):
    model = nn.Sequential(nn.Linear(3, 3))

    def half_done(model):
        change(model)
        raise ValueError("no")

    seen = refusals.count
    wrong = refusals._raises(AssertionError, match="a call was refused, and 'model' has changed: no")
    with wrong, pytest.raises(ValueError, match="no"):
        half_done(model)
    assert refusals.count == seen


def test_a_refused_call_that_changed_nothing_is_counted():
    model, seen = nn.Sequential(nn.Linear(3, 3)), refusals.count
    with pytest.raises(RuntimeError):
        model(torch.ones(2, 4))
    assert refusals.count == seen + 1


def test_what_is_expected_is_still_checked():
    model = nn.Sequential(nn.Linear(3, 3))
    for body in (ValueError("other words"), KeyError("no")):
        with refusals._raises((AssertionError, KeyError)), pytest.raises(ValueError, match=r"^no$"):
            raise body
    with refusals._raises(BaseException, match="DID NOT RAISE"), pytest.raises(ValueError, match="no"):
        model(torch.ones(2, 3))
