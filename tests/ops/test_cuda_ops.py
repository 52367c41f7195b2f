"""The registrations for CUDA, as far as a CPU can tell: the same body under ``triton_op``."""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from ipca.ops import cuda, linear, pc_linear
from ipca.ops.op import Layer
from tests.helpers.kernel_inputs import DEVICE

N, K, R = 17, 24, 5
FORMS = pytest.mark.parametrize("intact", [False, True], ids=["residual", "intact"])


def tensors(intact, *, bias=True):
    A, B = torch.randn(R, K, device=DEVICE) / K**0.5, torch.randn(N, R, device=DEVICE)
    frozen = (torch.randn_like(A) / K**0.5, torch.randn_like(B)) if intact else (None, None)
    weight = torch.randn(N, K, device=DEVICE) / K**0.5
    return Layer(
        weight, A.requires_grad_(), B.requires_grad_(), torch.randn(N, device=DEVICE) if bias else None, *frozen, 0.7
    )


@pytest.fixture
def _cuda_ops(monkeypatch):
    """Calls go to the ops of CUDA, on whatever device."""
    monkeypatch.setattr(linear, "_traced", linear._traced_on_cuda)


@FORMS
@pytest.mark.parametrize("M", [5, 0])
def test_opcheck(intact, M):
    W, A, B, bias, A0, B0, scaling = tensors(intact)
    x = torch.randn(M, K, device=DEVICE, requires_grad=True)
    torch.library.opcheck(cuda.pc_linear_op, (x, W, A, B, bias, A0, B0, None, scaling, 0.0, "reference", "", True))
    given = [t if t is None else t.detach() for t in (x, x @ A.mT, W, A, B, bias, A0, B0)]
    settings = (None, scaling, 0.0, "reference", "", [True, False, True, True, False])
    dy = torch.randn(M, N, device=DEVICE)
    torch.library.opcheck(cuda.pc_linear_backward_op, (dy, *given, *settings))


@FORMS
def test_opcheck_on_mixed_dtypes_and_strided_input(intact):
    W, A, B, bias, A0, B0, scaling = tensors(intact)
    x = torch.randn(K, 10, device=DEVICE, dtype=torch.bfloat16)[:, ::2].mT.requires_grad_()
    given = (x, W.bfloat16(), A, B, bias.bfloat16(), A0, B0, None, scaling, 0.0, "reference", "", True)
    torch.library.opcheck(cuda.pc_linear_op, given)


@pytest.mark.slow
@FORMS
@pytest.mark.usefixtures("_cuda_ops")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_whole_without_recompiling(intact, dropout, backend):
    """As a whole graph; varying numbers of tokens take the code of the first; the same numbers as eager."""
    W, A, B, bias, A0, B0, scaling = tensors(intact)

    def step(x):
        return pc_linear(x, W, A, B, bias, A0=A0, B0=B0, scaling=scaling, dropout=dropout).relu()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for M in (300, 700, 33):
        x = torch.randn(M, K, device=DEVICE, requires_grad=True)
        found = compiled(x)
        dy = torch.randn_like(found)
        grads = torch.autograd.grad(found, [x, A, B], dy)
        frames.append(counter.frame_count)
        if dropout == 0.0:  # inductor has random numbers of its own
            want = step(x)
            wanted = torch.autograd.grad(want, [x, A, B], dy)
            for got, other in zip((found, *grads), (want, *wanted), strict=True):
                torch.testing.assert_close(got, other, rtol=1e-4, atol=1e-4)
        else:
            assert found.isfinite().all()
            assert not torch.equal(found, compiled(x))  # a new mask in every call
    assert len(set(frames)) == 1


@pytest.mark.usefixtures("_cuda_ops")
def test_a_compiled_graph_sees_through_the_op():
    """AOT decomposes it: the compiler gets matrix products, not an opaque call."""
    from torch._dynamo.backends.common import aot_autograd

    W, A, B, bias, _, _, scaling = tensors(False)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: pc_linear(x, W, A, B, bias, scaling=scaling), backend=aot_autograd(fw_compiler=keep), fullgraph=True
    )
    compiled(torch.randn(6, K, device=DEVICE, requires_grad=True)).sum().backward()
    forward, backward = graphs
    assert "ipca" not in forward + backward
    assert "aten.addmm" in forward
    assert "aten.mm" in backward or "aten.addmm" in backward


def test_the_build_follows_sources_and_measurements(monkeypatch, tmp_path):
    """Else torch.compile would take a graph from its disk cache that another version, or no measurement, has left."""
    monkeypatch.setenv("IPCA_CACHE", str(tmp_path))
    assert cuda._build() == cuda._build() == cuda.BUILD
    (tmp_path / "some-gpu.json").write_text("{}")
    assert cuda._build() != cuda.BUILD


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_loads_neither_triton_nor_cuda():
    code = (
        "import sys, torch, ipca; print([name in sys.modules for name in ('triton', 'ipca.ops.cuda', 'ipca.kernels')])"
    )
    assert run(code) == "[False, False, False]"
    assert run("import torch, ipca; print(torch.cuda.is_initialized())") == "False"


def test_a_cpu_tensor_loads_no_kernel():
    code = """
import sys, torch, ipca
layer = ipca.nn.LinearPC(16, 8, rank=2)
layer(torch.randn(3, 16)).sum().backward()
ipca.nn.explain(layer, torch.randn(3, 16))
print([name for name in sys.modules if name.startswith(("ipca.kernels", "ipca.ops.cuda"))])
"""
    assert run(code) == "[]"
