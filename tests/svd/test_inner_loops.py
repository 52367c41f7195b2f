"""Choice of the implementation; on a GPU the CUDA kernels against PyTorch on the CPU."""

import subprocess
import sys

import pytest
import torch

from ipca.svd import inner_loops

EPS = torch.finfo(torch.float64).eps
DTYPES = [torch.float64, torch.float32]


def ldlt_arguments(batch=2, n=20, k=8, dtype=torch.float64, device="cpu"):
    """The last ``n`` rows of larger matrices, and views of what belongs to them."""
    A = torch.randn(batch, n + 3, n + 3, dtype=torch.float64)
    A = A + A.mT + 3 * n**0.5 * torch.diag_embed(torch.randn(batch, n + 3).sign())
    growth, positive = torch.rand(batch, n + 3, dtype=dtype), torch.arange(batch)
    tensors = A.to(dtype), growth, positive, torch.full((batch,), 1e-10, dtype=dtype)
    A, growth, positive, tiny = (tensor.to(device) for tensor in tensors)
    return A[:, 3:, 3 : 3 + k], growth[:, 3:], positive, tiny


def gram(batch=2, p=20, dtype=torch.float64, device="cpu"):
    X = torch.randn(batch, 4 * p, p, dtype=torch.float64) * torch.logspace(-2, 2, p, dtype=torch.float64)
    return (X.mT @ X).to(device, dtype)


def lanczos_arguments(chains=3, n=50, steps=6, step=3, dtype=torch.float64, device="cpu"):
    basis = torch.full((steps + 1, chains, n), float("nan"), dtype=torch.float64)
    basis[: step + 1] = torch.linalg.qr(torch.randn(chains, n, step + 1, dtype=torch.float64)).Q.permute(2, 0, 1)
    product, (alpha, beta) = torch.randn(chains, n), torch.zeros(2, chains, steps)
    return *(tensor.to(device, dtype) for tensor in (basis, product, alpha, beta)), step


def copies(arguments):
    """The same arguments over memory of their own; what is around a view is lost."""
    return tuple(argument.clone() if torch.is_tensor(argument) else argument for argument in arguments)


CALLS = {
    "ldlt_panel_": (inner_loops.ldlt_panel_, ldlt_arguments),
    "scaled_cholesky": (inner_loops.scaled_cholesky, lambda: (gram(),)),
    "lanczos_step_": (inner_loops.lanczos_step_, lanczos_arguments),
}


def test_importing_loads_no_extension_and_starts_no_cuda():
    code = """
import sys
import ipca, ipca.svd.inner_loops, torch
from ipca import _extension
ipca.svd.inner_loops.scaled_cholesky(torch.eye(3)[None])
assert not [name for name in sys.modules if name.endswith("_C") and name.startswith("ipca")]
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


class OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU, where there is none."""

    is_cuda = True

    def get_device(self):
        return 3


def test_a_gpu_gets_the_extension_or_pytorch(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, index))
    monkeypatch.setattr(inner_loops._extension, "load", lambda *device: asked.append(device))
    inner_loops._extension_on.cache_clear()
    G = gram().as_subclass(OnCuda)
    for _ in range(2):
        inner_loops.scaled_cholesky(G)
    assert asked == [(3, (9, 3))]  # once a device; without an extension PyTorch's version has run
    inner_loops._extension_on.cache_clear()
    monkeypatch.setattr(inner_loops._extension, "load", lambda *device: "extension")
    monkeypatch.setattr(inner_loops, "launch_scaled_cholesky", lambda *arguments: arguments)
    assert inner_loops.scaled_cholesky(G)[0] == "extension"
    inner_loops._extension_on.cache_clear()


@pytest.fixture(scope="module")
def extension():
    """The extension for this GPU; PyTorch's version against itself would prove nothing."""
    found = inner_loops._extension_on(torch.cuda.current_device())
    assert found is not None
    return found


def error_of(found, truth):
    return float((found.double().cpu() - truth).abs().max() / (truth.abs().max() or 1))


def at_most_twice(ours, torchs, truth, eps):
    assert error_of(ours, truth) <= 2 * error_of(torchs, truth) + 8 * eps


@pytest.mark.gpu
@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "n", "k"), [(1, 64, 64), (3, 65, 64), (2, 1000, 64), (2, 131, 17), (132, 200, 64)])
def test_ldlt_panel_on_a_gpu(dtype, batch, n, k):
    """Float32 against float64; float64 by what it says of the matrix, ``A = L D Lᵀ``."""
    given = ldlt_arguments(batch, n, k, dtype, "cuda")
    around = given[0]._base.clone()
    before = copies(given)
    torchs = tuple(argument.cpu() for argument in copies(given))
    inner_loops.ldlt_panel_(*given)
    inner_loops.ldlt_panel_(*torchs)
    eps = torch.finfo(dtype).eps
    assert given[2].tolist() == torchs[2].tolist()
    torch.testing.assert_close(given[1].cpu(), torchs[1], rtol=1e3 * eps, atol=0)
    errors = []
    for panel in (given[0].cpu().double(), torchs[0].double()):
        D = panel[:, :k].diagonal(dim1=-2, dim2=-1)
        L = panel.tril(-1)
        L[:, :k] += torch.eye(k, dtype=torch.float64)
        difference = (L * D[:, None] @ L[:, :k].mT - before[0].cpu().double()).tril()
        errors.append(float(difference.abs().max()))
    assert errors[0] <= 2 * errors[1] + 8 * eps * float(torchs[1].max())
    given[0].copy_(before[0])
    assert torch.equal(given[0]._base, around)  # nothing beside the panel was written


@pytest.mark.gpu
@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [1, 31, 32, 33, 128, 200, 512])
def test_scaled_cholesky_on_a_gpu(dtype, p):
    G = gram(3, p, dtype, "cuda")
    G[1] = 0
    G[1].diagonal()[: p // 2] = 2.0
    T, shift = inner_loops.scaled_cholesky(G)
    theirs, _ = inner_loops.scaled_cholesky(G.cpu())
    truth, _ = inner_loops.scaled_cholesky(G.cpu().double())
    assert shift.tolist() == [0, 0, 0]
    for i in range(3):
        at_most_twice(T[i], theirs[i], truth[i], p * torch.finfo(dtype).eps)
    assert not T.tril(-1).any()


@pytest.mark.gpu
@pytest.mark.usefixtures("extension")
def test_scaled_cholesky_shifts_on_a_gpu():
    p, rank = 100, 30
    X = torch.randn(2, 300, rank, dtype=torch.float64) @ torch.randn(2, rank, p, dtype=torch.float64)
    X[1] = torch.randn(300, p, dtype=torch.float64)
    G = (X.mT @ X).cuda()
    T, shift = inner_loops.scaled_cholesky(G)
    least = 16 * p * EPS
    assert min(abs(shift[0].item() / (least * 100**i) - 1) for i in range(3)) < 1e-12
    assert shift[1] == 0
    moved = G + shift[:, None, None] * torch.diag_embed(G.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close((T.mT @ moved @ T).cpu(), torch.eye(p).double().expand(2, p, p), atol=0.05, rtol=0)
    T, _ = inner_loops.scaled_cholesky(torch.full_like(G, float("nan")))
    assert T.isnan().all()


@pytest.mark.gpu
@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("chains", "n", "steps", "step"), [(1, 5, 4, 0), (3, 1001, 48, 47), (160, 300, 9, 4)])
def test_lanczos_step_on_a_gpu(dtype, chains, n, steps, step):
    given = lanczos_arguments(chains, n, steps, step, dtype, "cuda")
    torchs = tuple(x.cpu() if torch.is_tensor(x) else x for x in copies(given))
    truth = tuple(x.double() if torch.is_tensor(x) else x for x in copies(torchs))
    inner_loops.lanczos_step_(*given)
    inner_loops.lanczos_step_(*torchs)
    inner_loops.lanczos_step_(*truth)
    eps = torch.finfo(dtype).eps
    for i in (2, 3):
        at_most_twice(given[i][:, step], torchs[i][:, step], truth[i][:, step], eps)
    at_most_twice(given[0][step + 1], torchs[0][step + 1], truth[0][step + 1], eps)
    overlap = (given[0][: step + 1].double() * given[0][step + 1].double()).sum(-1)
    assert overlap.abs().max() <= 8 * eps


@pytest.mark.gpu
@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_twice_without_waiting_on_a_gpu(name, dtype):
    function, arguments = CALLS[name]
    given = [
        x.to("cuda", dtype if x.is_floating_point() else x.dtype) if torch.is_tensor(x) else x for x in arguments()
    ]
    results = []
    for _ in range(2):
        ours = copies(given)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = function(*ours)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append([x for x in (*ours, *(found or ())) if torch.is_tensor(x)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.usefixtures("extension")
def test_work_is_queued_on_the_current_stream():
    G, stream = gram(8, 256, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # what the kernel reads is written behind this
        moved = 4 * G
        T, _ = inner_loops.scaled_cholesky(moved)
    stream.synchronize()
    torch.testing.assert_close(T, inner_loops.scaled_cholesky(G)[0] / 2, rtol=0, atol=0)


@pytest.mark.gpu
def test_what_cuda_refuses_is_said_with_the_kernels_name(extension):
    with pytest.raises(RuntimeError, match=r"scaled_cholesky_kernel: invalid argument \(cudaErrorInvalidValue\)"):
        extension.scaled_cholesky_float64(0, 0, 0, 0, 0, 0, 0, 1, 1 << 20)  # 8 MiB of shared memory
    inner_loops.scaled_cholesky(gram(device="cuda"))  # and the next call is none the worse


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.usefixtures("extension")
def test_the_other_device_runs_its_own_and_the_current_one_stays():
    G = gram(device="cuda:1")
    T, _ = inner_loops.scaled_cholesky(G)
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(T.cpu(), inner_loops.scaled_cholesky(G.to("cuda:0"))[0].cpu(), rtol=0, atol=0)
    assert torch.ones(1, device="cuda").device.index == 0
