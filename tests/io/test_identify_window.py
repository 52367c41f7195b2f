"""Which window a product of two factors is, and counts of singular values."""

import pytest
import torch

from ipca import Window, window_svd
from ipca.io.from_peft import identify_window, singular_values_above

SHAPES = [(130, 101), (101, 130), (67, 67)]


def matrix(m: int, n: int) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(m))


def factors(W: torch.Tensor, start: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    found = window_svd(W, Window(start, rank), dtype=torch.float64)
    root = found.S.sqrt()
    return found.U * root, root[:, None] * found.Vh


@pytest.mark.parametrize("shape", SHAPES)
def test_count_is_that_of_the_singular_values(shape):
    W = 1e-3 * matrix(*shape)
    S = torch.linalg.svdvals(W.double())
    for value in ((S[3] + S[4]) / 2, (S[-9] + S[-8]) / 2, 2 * S[0]):
        assert singular_values_above(W, value.item()) == int((value < S).sum())


@pytest.mark.parametrize("rank", [1, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_window_is_found_from_rounded_factors(shape, rank):
    W, d = matrix(*shape), min(shape)
    for start in (0, 1, d // 2, d - rank - 1, d - rank):
        B, A = factors(W, start, rank)
        found, off = identify_window(W, B.bfloat16(), A.bfloat16())
        assert found.report.window == Window(start, rank)
        assert found.report.certified
        assert 1e-5 < off < 1e-2


@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_counts_and_not_its_split(shape):
    W = matrix(*shape)
    B, A = factors(W, 20, 6)
    T = 3 * torch.linalg.qr(torch.randn(6, 6))[0].double()
    found, off = identify_window(W, (B @ T).float(), (torch.linalg.inv(T) @ A).float())
    assert found.report.window == Window(20, 6)
    assert 1e-9 < off < 1e-5


def test_the_index_next_to_it_is_far_off():
    W = matrix(130, 101)
    B, A = factors(W, 40, 5)
    assert identify_window(W, B, A)[1] < 1e-12
    assert identify_window(W, B, A, start=41)[1] > 0.5


def test_what_is_no_window_is_far_off():
    W = matrix(130, 101)
    B, A = factors(W, 40, 5)
    assert identify_window(W, 1.1 * B, A)[1] == pytest.approx(0.1, rel=1e-6)  # another scaling
    assert identify_window(W, torch.randn(130, 5), A)[1] > 0.5
    assert identify_window(W, B, torch.randn(5, 101))[1] > 0.5
    assert identify_window(W, torch.zeros(130, 5), A)[1] > 0.5
    assert identify_window(torch.zeros(130, 101), B, A)[1] > 0.5
