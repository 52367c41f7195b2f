import pytest
import torch
from torch import nn

import ipca
from ipca.nn import LinearPC, backends, explain


@pytest.fixture(autouse=True)
def _auto():
    before = ipca.set_backend("auto")
    yield
    ipca.set_backend(before)


def layer(**options):
    return LinearPC.from_linear(nn.Linear(40, 24), rank=4, **options)


def test_what_runs_and_why():
    found = explain(layer(), torch.randn(3, 5, 40))
    assert found.backend == "reference"
    assert found.kernels == ()
    assert str(found) == (
        "x (15, 40) by weight (24, 40), rank 4, intact form, float32 on cpu: "
        "reference, because x is on cpu: the kernels are for CUDA."
    )


@pytest.mark.parametrize("name", ["addmm", "merged", "reference", "triton"])
def test_a_backend_set_by_name(name):
    ipca.set_backend(name)
    found = explain(layer(form="intact"), torch.randn(5, 40))
    assert found.backend == name
    assert f"intact form, float32 on cpu: {name}, because '{name}' was set by name." in str(found)


def test_the_kernels_and_their_configurations():
    ipca.set_backend("triton")
    (kernel,) = explain(layer(), torch.randn(5, 40)).kernels
    assert kernel.startswith("few_tokens 16 × ")
    project, linear = explain(layer(), torch.randn(500, 40)).kernels
    assert project.startswith("project ")
    assert linear.endswith(", pointers")
    ipca.set_backend("addmm")
    assert len(explain(layer(), torch.randn(500, 40)).kernels) == 1


def test_it_sees_what_the_call_sees():
    adapted, x = layer(dropout=0.5, form="intact"), torch.randn(5, 40)
    assert ", dropout, float32" in str(explain(adapted, x))
    assert "dropout" not in str(explain(adapted.eval(), x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "bfloat16" in str(explain(adapted, x))
    with adapted.disabled():
        assert "one plain product, because the layer is disabled" in str(explain(adapted, x))
    adapted.merge()
    found = explain(adapted, x)
    assert found.backend == "linear"
    assert found.reason == "the layer is merged"
    residual = layer(form="residual")
    with residual.disabled():
        assert explain(residual, x).backend == "reference"


def test_a_backend_that_cannot_run_raises_as_the_call_does():
    ipca.set_backend("merged")
    adapted = layer(dropout=0.5)
    messages = []
    for attempt in (lambda: explain(adapted, torch.randn(5, 40)), lambda: adapted(torch.randn(5, 40))):
        with pytest.raises(RuntimeError, match="cannot run") as error:
            attempt()
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_which_backends_could_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = backends(layer(dropout=0.1), torch.randn(5, 40))
    assert found == {
        "triton": "it needs a CUDA device, x is on cpu",
        "addmm": "",
        "merged": "dropout acts on the low-rank branch only, and a merged weight has none",
        "reference": "",
    }


def test_what_cannot_be_explained():
    with pytest.raises(TypeError, match=r"expected a LinearPC, got Linear; take one from a model's modules\(\)"):
        explain(nn.Linear(3, 3), torch.randn(1, 3))
    with pytest.raises(ValueError, match="x has 39 features, but the layer takes 40"):
        explain(layer(), torch.randn(1, 39))
