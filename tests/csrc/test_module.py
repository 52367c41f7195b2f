"""From tensors through the Python module into the kernels and back: addresses, strides, sizes and checks."""

import pytest
import torch

from ipca.svd import inner_loops

DTYPES = [torch.float64, torch.float32]


def symmetric(batch, n, dtype):
    A = torch.randn(batch, n, n, dtype=torch.float64)
    return (A + A.mT + 3 * n**0.5 * torch.diag_embed(torch.randn(batch, n).sign())).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_factorization_of_panels_inside_a_larger_matrix(module, dtype):
    """Panels are views into the matrix, growth into one of its own; A = L D Lᵀ holds if nothing is misplaced."""
    batch, n, k = 2, 150, 64
    A = symmetric(batch, n, dtype)
    LD, growth = A.tril(), torch.zeros(batch, n, dtype=dtype)
    positive, tiny = torch.zeros(batch, dtype=torch.int64), torch.full((batch,), 1e-12, dtype=torch.float64)
    for first in range(0, n, k):
        end = min(first + k, n)
        inner_loops.launch_ldlt_panel(module, LD[:, first:, first:end], growth[:, first:], positive, tiny)
        done, D = LD[:, end:, first:end], LD[:, first:end, first:end].diagonal(dim1=-2, dim2=-1)
        LD[:, end:, end:] -= (done * D[:, None] @ done.mT).tril()
    D = LD.diagonal(dim1=-2, dim2=-1)
    L = LD.tril(-1) + torch.eye(n, dtype=dtype)
    eps = torch.finfo(dtype).eps
    assert (L * D[:, None] @ L.mT - A).abs().max() <= 4 * eps * growth.max()
    torch.testing.assert_close(growth, (L.square() @ D.abs()[..., None])[..., 0], rtol=n * eps, atol=0)
    assert positive.tolist() == (torch.linalg.eigvalsh(A.double()) > 0).sum(-1).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "columns", "view"])
def test_scaled_cholesky(module, dtype, layout):
    X = torch.randn(2, 90, 33, dtype=torch.float64) * torch.logspace(-2, 2, 33, dtype=torch.float64)
    G = (X.mT @ X).to(dtype)
    if layout == "columns":
        G = G.mT.contiguous().mT
    if layout == "view":
        G = torch.nn.functional.pad(G, (1, 2, 3, 4), value=float("nan"))[:, 3:-4, 1:-2]
    T, shift = inner_loops.launch_scaled_cholesky(module, G)
    want, _ = inner_loops.scaled_cholesky(G)
    assert T.is_contiguous()
    assert shift.tolist() == [0, 0]
    torch.testing.assert_close(
        T, want, rtol=1e3 * torch.finfo(dtype).eps, atol=1e3 * torch.finfo(dtype).eps * float(want.max())
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_lanczos_recurrences(module, dtype):
    """All steps of a tridiagonalization, by the kernel and by PyTorch; a chain's G has five eigenvalues, so it ends."""
    chains, n, steps = 3, 40, 7
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    G = ((Q * torch.arange(n).remainder(5)) @ Q.T).to(dtype)
    start = torch.nn.functional.normalize(torch.randn(chains, n, dtype=dtype), dim=-1)
    found = []
    for run in (lambda *args: inner_loops.launch_lanczos_step(module, *args), inner_loops.lanczos_step_):
        wide = torch.full((chains, steps + 1, n + 3), float("nan"), dtype=dtype)
        basis = wide[..., :n].transpose(0, 1)  # a chain's vectors together, with room between them
        alpha, beta = torch.zeros(steps, chains, dtype=dtype).mT, torch.zeros(chains, steps, dtype=dtype)
        basis[0] = start
        for step in range(steps):
            run(basis, basis[step] @ G, alpha, beta, step)
        assert wide[..., n:].isnan().all()
        found.append((basis, alpha, beta))
    (basis, alpha, beta), (_, want_alpha, want_beta) = found
    bound = 1e3 * torch.finfo(dtype).eps
    torch.testing.assert_close(alpha[:, :5], want_alpha[:, :5], atol=bound, rtol=0)
    torch.testing.assert_close(beta[:, :4], want_beta[:, :4], atol=bound, rtol=0)
    seen = basis[:5].transpose(0, 1)
    torch.testing.assert_close(seen @ seen.mT, torch.eye(5, dtype=dtype).expand(chains, 5, 5), atol=bound, rtol=0)


def test_empty_batches_are_left_alone(module):
    inner_loops.launch_ldlt_panel(
        module, torch.ones(0, 9, 4), torch.ones(0, 9), torch.ones(0, dtype=torch.int64), torch.ones(0)
    )
    T, shift = inner_loops.launch_scaled_cholesky(module, torch.ones(0, 5, 5))
    assert (T.shape, shift.shape) == ((0, 5, 5), (0,))
    inner_loops.launch_lanczos_step(
        module, torch.ones(3, 0, 5), torch.ones(0, 5), torch.ones(0, 2), torch.ones(0, 2), 1
    )


def ldlt_arguments(**changed):
    arguments = {"panel": symmetric(2, 9, torch.float64)[..., :4], "growth": torch.zeros(2, 9, dtype=torch.float64)}
    arguments |= {"positive": torch.zeros(2, dtype=torch.int64), "tiny": torch.ones(2, dtype=torch.float64)}
    return {**arguments, **changed}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"panel": torch.zeros(2, 9, 4, dtype=torch.float16)},
            "panel is torch.float16; the kernels take float32 and float64",
        ),
        ({"panel": torch.zeros(2, 4, 9).mT}, r"panel's last dimension has stride 9; 1 fits\. Make it contiguous"),
        ({"growth": torch.zeros(2, 8)}, r"growth is \(2, 8\) torch.float32 cpu; \(2, 9\) torch.float64 cpu fits"),
        ({"growth": torch.zeros(2, 9)}, r"growth is \(2, 9\) torch.float32 cpu; \(2, 9\) torch.float64 cpu fits"),
        ({"positive": torch.zeros(2)}, "positive is .* torch.int64 cpu fits"),
        ({"positive": torch.zeros(4, dtype=torch.int64)[::2]}, "positive's last dimension has stride 2"),
        ({"tiny": torch.ones(3)}, r"tiny is \(3,\) .*; \(2,\) "),
        (
            {"panel": symmetric(2, 3, torch.float64).repeat(1, 1, 2), "growth": torch.zeros(2, 3).double()},
            "6 columns and 3 rows",
        ),
    ],
)
def test_what_does_not_fit_a_panel_is_said(module, changed, words):
    with pytest.raises((TypeError, ValueError), match=words):
        inner_loops.launch_ldlt_panel(module, **ldlt_arguments(**changed))


def test_more_columns_than_a_panel_holds_are_refused(module):
    n = inner_loops.PANEL + 1
    arguments = ldlt_arguments(panel=symmetric(2, n, torch.float64), growth=torch.zeros(2, n, dtype=torch.float64))
    assert module.panel == inner_loops.PANEL
    with pytest.raises(ValueError, match="A panel of 65 columns and 65 rows; 1 to 64 columns fit"):
        inner_loops.launch_ldlt_panel(module, **arguments)


@pytest.mark.parametrize("step", [-1, 2])
def test_a_step_outside_of_the_basis_is_refused(module, step):
    with pytest.raises(ValueError, match=f"step {step} of a basis with room for 3 vectors; 0 to 1 fit"):
        inner_loops.launch_lanczos_step(
            module, torch.ones(3, 1, 5), torch.ones(1, 5), torch.ones(1, 2), torch.ones(1, 2), step
        )


def test_shapes_of_the_others_are_checked(module):
    with pytest.raises(ValueError, match=r"G is \(1, 5, 4\) .*; \(1, 5, 5\) "):
        inner_loops.launch_scaled_cholesky(module, torch.ones(1, 5, 4))
    with pytest.raises(ValueError, match=r"beta is \(1, 3\) .*; \(1, 2\) "):
        inner_loops.launch_lanczos_step(
            module, torch.ones(3, 1, 5), torch.ones(1, 5), torch.ones(1, 2), torch.ones(1, 3), 0
        )
