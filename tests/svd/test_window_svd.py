"""Every claim is scale-free: within ten float64 roundings a row or column, plus one rounding to the dtype returned."""

import math

import pytest
import torch

from ipca import Window, window_svd
from ipca.svd import SVDReport, WindowSVD, singular_values

F64 = torch.float64
SHAPES = [(1, 1), (1, 7), (7, 1), (5, 7), (7, 5), (48, 65), (65, 48), (64, 64), (300, 255), (257, 300), (2100, 257)]
PATHS = {"gram_eigh": (75, 64), "tridiagonal": (257, 300)}


def orthonormal(m, n):
    return torch.linalg.qr(torch.randn(m, n, dtype=F64))[0]


def matrix(m, n, S):
    S = torch.as_tensor(S, dtype=F64)
    return (orthonormal(m, len(S)) * S) @ orthonormal(n, len(S)).mT


def falling(m, n):
    """Values from 2 to 1 at even distances."""
    return torch.linspace(2, 1, min(m, n), dtype=F64)


def rounding(m, n):
    return 10 * torch.finfo(F64).eps * max(m, n)


def assert_window_of(found, W, start, rank, condition=1.0):
    """``condition`` is σ₁ over the window's values: the Gram matrix loses that factor."""
    m, n = W.shape
    U, S, Vh = found.U.to(F64), found.S.to(F64), found.Vh.to(F64)
    assert (U.shape, S.shape, Vh.shape) == ((m, rank), (rank,), (rank, n))
    values = torch.linalg.svdvals(W.to(F64))
    bound = 2 * rank**0.5 * torch.finfo(found.S.dtype).eps + condition * rounding(m, n)
    sigma1, eye = values[0].item() or 1.0, torch.eye(rank, dtype=F64)
    assert found.report.window == Window(start, rank)
    assert torch.linalg.matrix_norm(U.mT @ U - eye, ord=2) <= bound
    assert torch.linalg.matrix_norm(Vh @ Vh.mT - eye, ord=2) <= bound
    assert torch.linalg.matrix_norm(W.to(F64) @ Vh.mT - U * S, ord=2) <= bound * sigma1
    assert torch.linalg.matrix_norm(W.to(F64).mT @ U - Vh.mT * S, ord=2) <= bound * sigma1
    assert (S - values[start : start + rank]).abs().max() <= bound * sigma1
    assert (S[:-1] >= S[1:]).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", ["principal", "middle", "minor"])
def test_the_window_of_a_matrix_of_any_shape(shape, rule):
    d = min(shape)
    rank = min(6, d)
    W = matrix(*shape, falling(*shape))
    found = window_svd(W, Window(rule, rank))
    assert found.report.path == ("tridiagonal" if d >= 192 else "gram_eigh")
    assert found.report.certified
    assert found.report.residual <= rounding(*shape)
    assert_window_of(found, W, {"principal": 0, "middle": (d - rank) // 2, "minor": d - rank}[rule], rank)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (65, 48), (256, 260)], ids=str)
def test_a_window_of_full_rank_rebuilds_the_matrix(shape):
    d = min(shape)
    W = torch.randn(shape)
    found = window_svd(W, Window(0, d))
    assert (found.report.path, found.report.certified) == ("tridiagonal" if d >= 192 else "gram_eigh", True)
    assert_window_of(found, W, 0, d)
    rebuilt = (found.U * found.S) @ found.Vh
    assert (rebuilt - W).norm() <= torch.finfo(torch.float32).eps * max(shape) * W.norm()


@pytest.mark.parametrize("shape", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("start", range(17, 23))
def test_the_indices_are_exact(shape, start):
    S = falling(*shape)
    found = window_svd(matrix(*shape, S), Window(start, 3))
    assert (found.S - S[start : start + 3]).abs().max() <= rounding(*shape) * S[0]


@pytest.mark.parametrize("shape", PATHS.values(), ids=PATHS)
def test_the_product_equals_that_of_a_full_svd_where_gaps_separate_the_window(shape):
    d, start, rank = min(shape), 20, 8
    S = torch.cat([torch.linspace(9, 8, start), torch.linspace(5, 4, rank), torch.linspace(1, 0.1, d - start - rank)])
    W = matrix(*shape, S)
    U, values, Vh = torch.linalg.svd(W, full_matrices=False)
    part = slice(start, start + rank)
    found = window_svd(W, Window(start, rank))
    want = (U[:, part] * values[part]) @ Vh[part]
    assert ((found.U * found.S) @ found.Vh - want).norm() <= rounding(*shape) * want.norm()


@pytest.mark.parametrize("shape", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
def test_every_float_dtype(shape, dtype):
    W = torch.randn(shape).to(dtype)
    found = window_svd(W, Window.middle(6))
    assert found.U.dtype == found.S.dtype == found.Vh.dtype == torch.promote_types(dtype, torch.float32)
    assert found.report.certified
    assert_window_of(found, W, (min(shape) - 6) // 2, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_autocast_changes_nothing(dtype):
    W = torch.randn(48, 65).to(dtype)
    plain = window_svd(W, Window(5, 7))
    with torch.autocast("cpu", torch.bfloat16):
        within = window_svd(W, Window(5, 7))
    assert all(torch.equal(getattr(within, name), getattr(plain, name)) for name in ("U", "S", "Vh"))


@pytest.mark.parametrize("shape", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize(
    ("scale", "dtype"), [(1e-30, torch.float32), (1e18, torch.float32), (1e-300, F64), (1e300, F64)]
)
def test_the_scale_does_not_matter(shape, scale, dtype):
    W = torch.randn(shape, dtype=dtype)
    exponent = math.floor(math.log2(scale))
    plain, scaled = (
        window_svd(W, Window.middle(6)),
        window_svd(torch.ldexp(W, torch.tensor(exponent)), Window.middle(6)),
    )
    assert scaled.report.certified
    assert torch.equal(scaled.U, plain.U)
    assert torch.equal(scaled.Vh, plain.Vh)
    assert torch.equal(scaled.S, torch.ldexp(plain.S, torch.tensor(exponent)))


@pytest.mark.parametrize("shape", PATHS.values(), ids=PATHS)
def test_one_outlier_hides_no_component(shape):
    W = matrix(*shape, falling(*shape))
    W[3, 4] = 1e4
    found = window_svd(W, Window.middle(6))
    start = (min(shape) - 6) // 2
    assert found.report.certified
    values = torch.linalg.svdvals(W)
    assert_window_of(found, W, start, 6, condition=(values[0] / values[start + 5]).item())
    spacing = (values[start - 1] - values[start + 6]) / 7
    assert (found.S - values[start : start + 6]).abs().max() < 1e-6 * spacing


def test_a_far_outlier_goes_to_the_full_svd():
    W = 1e-4 * torch.randn(300, 260)
    W[3, 4] = 1e4
    found = window_svd(W, Window.middle(6))
    assert (found.report.path, found.report.certified) == ("full", True)
    assert_window_of(found, W, 127, 6)


@pytest.mark.parametrize("shape", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("width", [0.0, 1e-14, 1e-10, 1e-4], ids=lambda width: f"width {width:g}")
def test_ties_and_clusters_inside_the_window_are_certified(shape, width):
    S = falling(*shape)
    S[22:26] = S[24] + width * torch.arange(3, -1, -1)
    W = matrix(*shape, S)
    found = window_svd(W, Window(20, 8))
    assert found.report.certified
    assert_window_of(found, W, 20, 8)


@pytest.mark.parametrize("shape", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize(("start", "edge"), [(16, 24), (24, 24), (23, 23)])
def test_a_tie_across_an_edge_is_reported(shape, start, edge):
    S = falling(*shape)
    S[22:26] = S[24]
    W = matrix(*shape, S)
    found = window_svd(W, Window(start, 1 if start == 23 else 8))
    assert (found.report.path, found.report.certified) == ("full", False)
    assert f"index {edge} cuts a tie" in found.report.certificate
    assert_window_of(found, W, start, len(found.S))


@pytest.mark.parametrize("d", [9, 260])
def test_equal_singular_values_have_no_certified_window_but_all(d):
    W = 3 * torch.eye(d)[torch.randperm(d)]
    found = window_svd(W, Window.middle(3))
    assert not found.report.certified
    assert "tie" in found.report.certificate
    assert_window_of(found, W, (d - 3) // 2, 3)
    assert window_svd(W, Window(0, d)).report.certified


@pytest.mark.parametrize("shape", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize(("start", "certified"), [(5, True), (32, True), (37, False), (40, False), (50, False)])
def test_a_rank_deficient_matrix(shape, start, certified):
    W = matrix(*shape, torch.linspace(2, 1, 40))
    found = window_svd(W, Window(start, 8))
    assert found.report.certified is certified
    assert ("cuts a tie" in found.report.certificate) is not certified
    assert_window_of(found, W, start, 8)


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), *PATHS.values()], ids=str)
def test_the_zero_matrix(shape):
    W = torch.zeros(shape)
    found = window_svd(W, Window.middle(1))
    assert not found.S.any()
    assert found.report.residual == 0
    assert found.report.certified is (shape == (1, 1))
    assert_window_of(found, W, (min(shape) - 1) // 2, 1)
    assert not singular_values(W).any()


@pytest.mark.parametrize("shape", [(0, 1), (9, 5), (257, 260)], ids=str)
def test_a_stack_equals_its_matrices(shape):
    W = torch.randn(3, *(shape if shape[0] else (1, 1)))
    rank = min(4, *W.shape[1:])
    stack = window_svd(W, Window.middle(rank))
    singles = [window_svd(each, Window.middle(rank)) for each in W]
    assert torch.equal(stack.U, torch.stack([one.U for one in singles]))
    assert torch.equal(stack.S, torch.stack([one.S for one in singles]))
    assert torch.equal(stack.Vh, torch.stack([one.Vh for one in singles]))
    assert [r.residual for r in stack.reports] == [one.report.residual for one in singles]


def test_a_spectral_rule_is_resolved_for_each_matrix_of_a_stack():
    steep, flat = matrix(9, 9, 2.0 ** -torch.arange(9)), matrix(9, 9, falling(9, 9))
    found = window_svd(torch.stack([steep, flat]), Window.energy(0.5, 2))
    starts = [Window.energy(0.5, 2).resolve(9, singular_values(W)).index for W in (steep, flat)]
    assert [report.window.index for report in found.reports] == starts == [1, 4]


def test_a_stack_reports_its_worst_matrix():
    good, tied = matrix(9, 9, falling(9, 9)), torch.eye(9, dtype=F64)
    found = window_svd(torch.stack([good, tied, good]), Window.middle(3))
    assert found.report is found.reports[1]
    fine, rough = (SVDReport("full", Window(0, 1), residual, True, "", 0.0) for residual in (1e-15, 1e-9))
    empty = torch.empty(0)
    assert WindowSVD(empty, empty, empty, (fine, rough, fine)).report is rough


@pytest.mark.parametrize("shape", PATHS.values(), ids=PATHS)
def test_the_largest_entry_of_each_row_of_Vh_is_positive(shape):
    for W in (torch.randn(shape), torch.randn(shape).mT):
        Vh = window_svd(W, Window.middle(6), dtype=F64).Vh
        assert (Vh.gather(1, Vh.abs().argmax(1, keepdim=True)) > 0).all()
        assert torch.equal(window_svd(-W, Window.middle(6), dtype=F64).Vh, Vh)


@pytest.mark.parametrize("shape", PATHS.values(), ids=PATHS)
def test_memory_layout_does_not_matter(shape):
    W = torch.randn(shape)
    want = window_svd(W, Window.middle(6))
    padded = torch.randn(shape[0] * 2, shape[1] + 5)
    padded[::2, 5:] = W
    for view in (W.mT.contiguous().mT, padded[::2, 5:], torch.nn.Parameter(W)):
        found = window_svd(view, Window.middle(6))
        assert not found.U.requires_grad
        assert found.report.certified
        assert_window_of(found, view.detach(), (min(shape) - 6) // 2, 6)
        assert (found.S - want.S).abs().max() <= torch.finfo(torch.float32).eps * want.S.max()


def test_an_expanded_row_has_one_component():
    row = torch.randn(1, 260)
    found = window_svd(row.expand(300, 260), Window.principal(1))
    assert found.report.certified
    assert_window_of(found, row.expand(300, 260), 0, 1)


@pytest.mark.parametrize("shape", PATHS.values(), ids=PATHS)
def test_an_exact_window_is_good_to_float64(shape):
    W = torch.randn(shape)
    assert_window_of(window_svd(W, Window.middle(6), tol="exact"), W, (min(shape) - 6) // 2, 6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_values_are_float64_and_descend(shape):
    W = torch.randn(shape).mul(1e-30)
    S, want = singular_values(W), torch.linalg.svdvals(W.to(F64))
    assert S.dtype == F64
    assert (S[:-1] >= S[1:]).all()
    assert (S - want).abs().max() <= rounding(*shape) * want[0]


def test_small_singular_values_keep_their_digits():
    S = torch.logspace(0, -12, 200, dtype=F64)
    W = matrix(300, 200, S)
    assert (singular_values(W) - S).abs().max() <= rounding(300, 200)
