"""The whole main job on a CUDA device, through every backend."""

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
    here, there = (ipca.window_svd(M, window, tol="exact") for M in (W, W.cuda()))
    assert there.U.is_cuda
    assert there.report.certified
    ours, theirs = (found.U * found.S @ found.Vh for found in (here, there))
    torch.testing.assert_close(theirs.cpu(), ours, atol=1e-5, rtol=0)
    torch.testing.assert_close(there.S.cpu(), here.S, atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("start", "path"), [("principal", "top"), (0.25, "interior"), ("minor", "bottom")])
def test_a_stack_is_a_batch_of_certified_windows(start, path, dtype):
    W = torch.randn(5, 700, 600, device="cuda")
    W[:, :, :30] *= torch.linspace(9, 3, 30, device="cuda")
    W = W.to(dtype)
    found = ipca.window_svd(W, ipca.Window(start, 8))
    index = found.report.window.index
    for one, matrix in enumerate(W):
        report = found.reports[one]
        assert (report.path, report.certified) == (path, True)
        values = torch.linalg.svdvals(matrix.double())
        torch.testing.assert_close(found.S[one].double(), values[index : index + 8], atol=0, rtol=1e-5)
    again = ipca.window_svd(W, ipca.Window(start, 8))
    assert torch.equal(found.U, again.U)
    assert torch.equal(found.Vh, again.Vh)


def test_a_matrix_of_a_stack_falls_back_alone():
    W = torch.randn(3, 400, 300, device="cuda", dtype=torch.float64)
    W[1] = torch.eye(400, 300, device="cuda")
    found = ipca.window_svd(W, ipca.Window.middle(8))
    assert [report.path for report in found.reports] == ["interior", "full", "interior"]
    assert [report.certified for report in found.reports] == [True, False, True]


def test_layers_of_one_shape_are_decomposed_together():
    model = nn.Sequential(*[nn.Linear(300, 300) for _ in range(3)], nn.Linear(300, 40)).cuda()
    ipca.apply_pc(model, rank=8, progress=False)
    reports = [layer.svd_report for layer in model]
    assert [report.path for report in reports] == ["interior"] * 3 + ["full"]
    assert all(report.certified for report in reports)
    assert reports[0].seconds == reports[1].seconds


@pytest.fixture
def _backend(request):
    before = ipca.set_backend(request.node.callspec.params["backend"])
    yield
    ipca.set_backend(before)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("backend", ["reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_intact_form_is_the_base_exactly(backend, dtype):
    """Through the reference to the bit; the other backends round the product with the weight in their own way."""
    base = network(dtype)
    x = torch.randn(17, 96, device="cuda", dtype=dtype)
    model = ipca.apply_pc(copy.deepcopy(base), rank=8, form="intact", progress=False)
    assert torch.equal(model(x), base(x))


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("backend", ["triton", "addmm", "merged", "reference", "auto"])
@pytest.mark.parametrize("form", ["residual", "intact"])
def test_train_save_load_move_and_merge(backend, form, tmp_path):
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
    if backend != "triton":
        torch.testing.assert_close(copy.deepcopy(model).cpu()(x.cpu()), trained.cpu(), atol=1e-4, rtol=0)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    torch.testing.assert_close(compiled(x), trained, atol=1e-4, rtol=0)
    torch.testing.assert_close(ipca.unload(model)(x), trained, atol=1e-4, rtol=0)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("backend", ["triton", "addmm", "merged", "auto"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiled_training_with_graphs_over_varying_tokens(backend, mode, dropout):
    """Whole graphs, no recompilation, CUDA graphs, and losses like those of eager mode."""
    if dropout and backend == "merged":
        pytest.skip("a merged weight has no dropout")
    torch._dynamo.reset()
    model = ipca.apply_pc(network(torch.bfloat16), rank=8, dropout=dropout, progress=False)
    compiled = torch.compile(model, fullgraph=True, mode=mode, dynamic=mode == "default")
    sizes = (300, 512, 777) if mode == "default" else (512, 512, 512)
    torch._dynamo.utils.counters.clear()
    for M in sizes:
        x = torch.randn(M, 96, device="cuda", dtype=torch.bfloat16)
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(x)
        y.float().square().mean().backward()
        if not dropout:
            want = model(x)
            assert (y - want).float().norm() <= 2e-2 * want.float().norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert all(p.grad.isfinite().all() for p in ipca.adapter_parameters(model))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_captured_graph_draws_a_new_mask_in_every_replay(dropout):
    layer = ipca.nn.LinearPC(96, 320, rank=8, dropout=dropout, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(512, 96, device="cuda", dtype=torch.bfloat16)
    ipca.set_backend("triton")
    try:
        with torch.no_grad():
            layer(x)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = layer(x)
            results = []
            for _ in range(2):
                graph.replay()
                results.append(y.clone())
    finally:
        ipca.set_backend("auto")
    assert torch.equal(*results) == (dropout == 0)


def test_autocast_gives_the_dtype_of_a_linear_layer():
    layer = ipca.nn.LinearPC(96, 320, rank=8, device="cuda")
    x = torch.randn(512, 96, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = layer(x)
        y.float().sum().backward()
    assert (y.dtype, x.grad.dtype, layer.lora_A.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_tuning_measures_and_keeps(tmp_path, monkeypatch):
    from ipca.device.tune import Cell, measure_configs
    from ipca.kernels import tables, tuning

    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setenv("IPCA_CACHE", str(tmp_path))
    monkeypatch.setenv("IPCA_AUTOTUNE", "1")
    path = tables.cache_file(torch.device("cuda"))
    assert measure_configs([Cell(64, 64, 64, 8)], torch.device("cuda"), seconds=60)
    kernels = {row[0][0] for row in tables.read(path)["configs"]}
    assert kernels == {"few_tokens", "project", "linear", "input_grad", "products", "outer"}
