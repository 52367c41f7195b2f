"""The whole main job on a CUDA device, through PyTorch's own kernels."""

import copy

import pytest
import torch
from torch import nn

import ipca

pytestmark = pytest.mark.gpu


def network(dtype=torch.float32):
    return nn.Sequential(nn.Linear(96, 320), nn.GELU(), nn.Linear(320, 300)).to("cuda", dtype)


@pytest.mark.parametrize("shape", [(300, 300), (700, 300), (64, 40)])
@pytest.mark.parametrize("start", ["principal", "middle", "minor"])
def test_a_window_equals_that_of_the_cpu(shape, start):
    W = torch.randn(shape, dtype=torch.float64)
    window = ipca.Window(start, 8)
    here, there = ipca.window_svd(W, window), ipca.window_svd(W.cuda(), window)
    assert there.U.is_cuda
    assert there.report.certified
    ours, theirs = (found.U * found.S @ found.Vh for found in (here, there))
    torch.testing.assert_close(theirs.cpu(), ours, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("form", "dtype"), [("intact", torch.float32), ("intact", torch.bfloat16)])
def test_the_intact_form_is_the_base_exactly(form, dtype):
    base = network(dtype)
    x = torch.randn(17, 96, device="cuda", dtype=dtype)
    model = ipca.apply_pc(copy.deepcopy(base), rank=8, form=form, progress=False)
    assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("form", ["residual", "intact"])
def test_train_save_load_move_and_merge(form, tmp_path):
    base = network()
    x, y = torch.randn(64, 96, device="cuda"), torch.randn(64, 300, device="cuda")
    model = ipca.apply_pc(copy.deepcopy(base), rank=8, form=form, progress=False)
    optimizer = torch.optim.AdamW(ipca.adapter_parameters(model), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    ipca.save_adapter(model, tmp_path)
    again = ipca.load_adapter(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(again(x), model(x), atol=1e-5, rtol=0)
    trained = model(x)
    torch.testing.assert_close(copy.deepcopy(model).cpu()(x.cpu()), trained.cpu(), atol=1e-4, rtol=0)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    torch.testing.assert_close(compiled(x), trained, atol=1e-4, rtol=0)
    torch.testing.assert_close(ipca.unload(model)(x), trained, atol=1e-4, rtol=0)
