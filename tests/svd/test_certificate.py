import pytest
import torch

from ipca import Window, window_svd
from ipca.svd import certificate, ldlt
from ipca.svd.eigensolvers import Tridiagonal
from ipca.svd.krylov import rayleigh_ritz
from ipca.svd.matrix_batch import MatrixBatch

F64 = torch.float64
EPS = torch.finfo(F64).eps
M, N, START, RANK = 300, 260, 40, 8


def orthonormal(m, n):
    return torch.linalg.qr(torch.randn(m, n, dtype=F64))[0]


def symmetric(eigenvalues):
    Q = orthonormal(len(eigenvalues), len(eigenvalues))
    G = (Q * torch.as_tensor(eigenvalues, dtype=F64)) @ Q.mT
    return (G + G.mT) / 2


def matrix(S):
    """``W (M, N)``, the batch of its windows, its Gram matrix and its singular vectors."""
    U, V = orthonormal(M, N), orthonormal(N, N)
    W = (U * S) @ V.mT
    batch = MatrixBatch(W[None], seed=0)
    return W, batch, batch.gram[0], U, S / batch.scale, V


def falling():
    return torch.linspace(2, 1, N, dtype=F64)


def judge(batch, U, S, V, start=START, neighbors=None):
    """The residual relative to σ₁, and whether ``U, S, V`` are certified as the window that starts at ``start``."""
    rho = residual(batch, U, S, V)
    (proof,) = certificate.certify(batch.gram, S[None], rho, batch.sigma1, start, neighbors)
    return (rho / batch.sigma1).item(), *proof


def residual(batch, U, S, V):
    return certificate.residual(batch, U[None], S[None], V[None])


def orthogonality(U, V):
    return certificate.orthogonality(U[None], V[None]).item()


def found_by_index(batch, start, rank):
    """``U, S, V`` by index from the tridiagonal form."""
    V = batch.tridiagonal[0].eigenvectors(range(start, start + rank)).mT
    return [part[0] for part in rayleigh_ritz(batch, V[None])[:3]]


def count(G, threshold, room=1e-6):
    (found,) = ldlt.count_above(G[None], torch.tensor([threshold], dtype=F64), torch.tensor([room])).tolist()
    return found


@pytest.mark.parametrize("n", [1, 2, 3, 7, 40, 129])
def test_counts_agree_with_eigenvalues_on_indefinite_matrices(n):
    G = symmetric(torch.randn(n))
    eigenvalues = torch.linalg.eigvalsh(G)
    middles = (eigenvalues[1:] + eigenvalues[:-1]) / 2
    for threshold in (eigenvalues[0] - 1, *middles, eigenvalues[-1] + 1):
        assert count(G, threshold.item()) == (eigenvalues > threshold).sum()


@pytest.mark.parametrize("n", [2, 3, 5, 8, 41, 130])
def test_counts_agree_where_a_zero_diagonal_forces_two_by_two_pivots(n):
    G = torch.randn(n, n, dtype=F64)
    G = (G + G.mT).fill_diagonal_(0)
    _, pivots = torch.linalg.ldl_factor(G)
    assert (pivots < 0).any()
    assert count(G, 0.0) == (torch.linalg.eigvalsh(G) > 0).sum()


def test_counts_agree_on_a_chain_of_two_by_two_pivots():
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=F64)
    G = torch.block_diag(swap, 3 * swap, 2 * torch.eye(3, dtype=F64), 5 * swap, -torch.eye(2, dtype=F64))
    assert count(G, 0.0) == 6
    assert count(G, 1.5) == 5
    assert count(G, -2.0) == 9


def test_counting_leaves_the_matrix_alone():
    G = symmetric([3.0, 2.0, 1.0])
    kept = G.clone()
    assert count(G, 1.5) == 2
    assert torch.equal(G, kept)


@pytest.mark.parametrize("start", [0, 1, START, N - RANK - 1, N - RANK])
def test_the_right_window_is_certified_by_counts(start):
    _, batch, *_ = matrix(falling())
    relative, certified, words = judge(batch, *found_by_index(batch, start, RANK), start=start)
    assert relative <= 10 * EPS * M
    assert certified
    assert (f"{start} above" in words) is (start > 0)
    assert (f"{start + RANK} through" in words) is (start + RANK < N)


def test_all_components_need_no_count():
    _, batch, *_ = matrix(falling())
    assert judge(batch, *found_by_index(batch, 0, N), start=0)[1:] == (True, "inertia: every component")


@pytest.mark.parametrize("shift", [-START, -1, 1, 2, N - START - RANK])
def test_the_components_of_another_window_are_not_certified(shift):
    _, batch, *_ = matrix(falling())
    relative, certified, words = judge(batch, *found_by_index(batch, START + shift, RANK))
    assert relative <= 10 * EPS * M
    assert not certified
    if shift > -START:
        assert f"{START + shift} singular values lie above the window, not {START}" in words


@pytest.mark.parametrize("skipped", range(1, RANK))
def test_a_window_that_skips_a_component_is_not_certified(skipped):
    _, batch, _, U, S, V = matrix(falling())
    kept = [k for k in range(START, START + RANK + 1) if k != START + skipped]
    relative, certified, words = judge(batch, U[:, kept], S[kept], V[:, kept])
    assert relative <= 10 * EPS * M
    assert not certified
    assert f"{START + RANK + 1} singular values lie above the window's end, not {START + RANK}" in words


def test_a_component_taken_twice_shows_in_the_orthogonality():
    _, batch, _, U, S, V = matrix(falling())
    twice = [*range(START, START + RANK - 1), START + RANK - 2]
    assert judge(batch, U[:, twice], S[twice], V[:, twice])[0] <= 10 * EPS * M
    for left, right in ((U[:, twice], V[:, twice]), (U[:, twice], V), (U, V[:, twice])):
        left, right = left[:, -RANK:], right[:, -RANK:]
        assert orthogonality(left, right) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_vectors_shifted_by_one_index_show_in_the_residual(side):
    _, batch, _, U, S, V = matrix(falling())
    window, shifted = slice(START, START + RANK), slice(START + 1, START + RANK + 1)
    left, right = (shifted if side in ("left", "both") else window), (shifted if side in ("right", "both") else window)
    found = residual(batch, U[:, left], S[window], V[:, right])
    spacing = (S[START] - S[START + 1]).item()
    assert found >= 0.99 * (spacing if side == "both" else S[START].item())


@pytest.mark.parametrize("angle", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_rotated_vector_shows_in_the_residual(side, angle):
    _, batch, _, U, S, V = matrix(falling())
    window, far = slice(START, START + RANK), N - 1
    wrong = (U if side == "left" else V).clone()
    wrong[:, START] = wrong[:, START] * (1 - angle**2) ** 0.5 + angle * wrong[:, far]
    left, right = (wrong, V) if side == "left" else (U, wrong)
    found = residual(batch, left[:, window], S[window], right[:, window])
    assert found >= 0.5 * angle * (S[START] - S[far]).item()
    assert found <= 2 * angle * S[START].item()


def test_left_vectors_outside_the_range_of_the_matrix_show_in_the_residual():
    _, batch, _, U, S, V = matrix(falling())
    window = slice(START, START + RANK)
    outside = torch.linalg.svd(U)[0][:, N : N + RANK]
    assert batch.rmatmul(outside[None]).norm() <= 10 * EPS * M
    found = residual(batch, U[:, window] + 1e-3 * outside, S[window], V[:, window])
    assert found == pytest.approx(1e-3 * S[START].item(), rel=1e-6)


def test_noise_in_V_is_not_certified():
    _, batch, _, _, _, V = matrix(falling())
    noisy = torch.linalg.qr(V[:, START : START + RANK] + 1e-2 * torch.randn(N, RANK, dtype=F64))[0]
    relative, certified, _ = judge(batch, *(part[0] for part in rayleigh_ritz(batch, noisy[None])[:3]))
    assert relative > 1e-3
    assert not certified


@pytest.mark.parametrize("value", [1.5, 0.5, 1e-3])
@pytest.mark.parametrize("start", [START - 2, START + 2, START + RANK - 2])
def test_a_tie_across_an_edge_is_not_certified(start, value):
    S = torch.cat(
        [torch.linspace(3, 2, START), torch.full((RANK,), value), value * torch.linspace(0.9, 0.1, N - START - RANK)]
    )
    _, batch, *_ = matrix(S.double())
    assert judge(batch, *found_by_index(batch, START, RANK))[1]
    assert not judge(batch, *found_by_index(batch, start, RANK), start=start)[1]


@pytest.mark.parametrize("edge", [START, START + RANK])
@pytest.mark.parametrize(("distance", "certified"), [(0.5, False), (4.0, True)])
def test_values_that_the_gram_matrix_cannot_tell_apart_are_not_certified(edge, distance, certified):
    """Of squares near 1e-12, all but the window's two neighbors stand far apart; the rounding is ``N eps``."""
    squares = torch.cat([torch.linspace(1, 1e-3, START), torch.full((RANK,), 1e-12), torch.zeros(N - START - RANK)])
    squares = squares.double()
    squares[START - 1 if edge == START else edge] = 1e-12 + (1 if edge == START else -1) * distance * N * EPS
    S = squares[START : START + RANK].sqrt()
    assert (
        certificate.certify(torch.diag(squares)[None], S[None], torch.zeros(1), torch.ones(1, dtype=F64), START)[0][0]
        is certified
    )


@pytest.mark.parametrize("level", [1e-8, 1e-9])
def test_a_window_below_the_noise_of_the_gram_matrix_is_not_certified(level):
    S = falling()
    S[START:] = level * torch.linspace(1, 0.5, N - START)
    _, batch, *_ = matrix(S)
    _, certified, words = judge(batch, *found_by_index(batch, START, RANK))
    assert not certified
    assert words.endswith("of the largest singular value, too low to count")


def test_left_vectors_of_a_null_space_show_in_the_residual():
    S = falling()
    S[START:] = 0
    _, batch, *_ = matrix(S)
    relative, certified, _ = judge(batch, *found_by_index(batch, START, RANK))
    assert relative > 1e-6
    assert not certified


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_path_off_by_one_falls_back_to_the_full_svd(monkeypatch, shift):
    S = falling()
    W = matrix(S)[0]
    want = window_svd(W, Window(START, RANK))
    right = Tridiagonal.eigenvectors
    monkeypatch.setattr(
        Tridiagonal, "eigenvectors", lambda T, wanted: right(T, range(wanted.start + shift, wanted.stop + shift))
    )
    found = window_svd(W, Window(START, RANK))
    assert (want.report.path, found.report.path) == ("tridiagonal", "full")
    assert found.report.certified
    assert (found.S - S[START : START + RANK]).abs().max() <= 10 * EPS * M * S[0]


@pytest.mark.parametrize("noise", [1e-5, 1e-2])
def test_a_tridiagonal_path_that_misses_tol_falls_back_to_the_full_svd(monkeypatch, noise):
    right = Tridiagonal.eigenvectors

    def noisy(T, wanted):
        V = right(T, wanted).mT
        return torch.linalg.qr(V + noise * torch.randn(V.shape, dtype=F64))[0].mT

    monkeypatch.setattr(Tridiagonal, "eigenvectors", noisy)
    report = window_svd(matrix(falling())[0], Window(START, RANK)).report
    assert (report.path, report.certified) == ("full", True)
    assert report.residual <= 10 * EPS * M


@pytest.mark.parametrize("edge", [START, START + RANK])
@pytest.mark.parametrize(("distance", "certified"), [(0.0, False), (0.5, False), (4.0, True)])
def test_a_full_svd_cannot_tell_values_apart_within_its_rounding(edge, distance, certified):
    spectrum = falling()
    spectrum[edge] = spectrum[edge - 1] - distance * M * EPS * spectrum[0]
    found, words = certificate.certify_full(spectrum, START, RANK, N, M)
    assert found is certified
    assert (f"edge at index {edge} cuts a tie" in words) is not certified


def test_the_ends_of_the_spectrum_are_no_edges():
    assert certificate.certify_full(torch.ones(9, dtype=F64), 0, 9, 9, 9)[0]
    assert not certificate.certify_full(torch.ones(9, dtype=F64), 0, 8, 9, 9)[0]
    assert not certificate.certify_full(torch.ones(9, dtype=F64), 1, 8, 9, 9)[0]


def test_the_largest_singular_value_is_a_close_lower_bound():
    for seed in range(5):
        batch = MatrixBatch(torch.randn(1, M, N), seed)
        sigma1 = torch.linalg.eigvalsh(batch.gram)[0, -1].sqrt().item()
        assert 0.9 * sigma1 <= batch.sigma1.item() <= sigma1


@pytest.fixture(params=["norm", "cholesky", "cholesky, float64"])
def proof(request, monkeypatch):
    """Each of the proofs of a first window, and the tolerance that leads to it."""
    if request.param == "cholesky":
        monkeypatch.setattr(certificate, "norm_bound_steps", lambda *_: N)  # more than it is worth
    return request.param, 1e-9 if "64" in request.param else 1e-6


@pytest.mark.parametrize("ratio", [0.99, 0.9, 0.1])
def test_a_first_window_is_proven(proof, ratio, monkeypatch):
    S = torch.cat([torch.linspace(3, 2, RANK), ratio * torch.linspace(2, 1, N - RANK)]).double()
    factorized, factorize = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda M: factorized.append(M) or factorize(M))
    certified, words = prove_first(S, range(RANK), proof)
    assert certified
    assert words.startswith("norm") == (proof[0] == "norm" and ratio == 0.1)
    assert any(len(M[0]) == N for M in factorized) == (proof[0] != "norm" or ratio > 0.1)  # what a narrow gap needs


@pytest.mark.parametrize("missed", range(RANK))
def test_a_first_window_that_misses_one_is_not_proven(proof, missed):
    kept = [k for k in range(RANK + 1) if k != missed]
    for gap in (0, 1):  # the second leaves a gap behind the window
        S = falling()
        S[RANK + 1 :] -= gap
        certified, words = prove_first(S, kept, proof)
        assert not certified
        assert f"no more than {RANK} singular values" in words


@pytest.mark.parametrize(("gap", "certified"), [(1e-5, "cholesky, float64"), (1e-7, None)])
def test_a_first_window_is_not_proven_within_the_rounding_of_the_gram_matrix(proof, gap, certified):
    if proof[0] == "cholesky, float64":
        gap *= 1e-3 if certified is None else 1
    S = torch.cat([torch.linspace(3, 2, RANK), 2 - gap - torch.linspace(0, 1, N - RANK)]).double()
    assert prove_first(S, range(RANK), proof)[0] is (proof[0] == certified)


def prove_first(S, kept, proof):
    """The components ``kept`` as the first window, the next one as their neighbor."""
    _, batch, _, U, S, V = matrix(S)
    kept = list(kept)
    found = S[kept][None]
    rho = residual(batch, U[:, kept], S[kept], V[:, kept])
    (verdict,) = certificate.certify_first(batch, found, V[:, kept][None], rho, S[kept[-1] + 1][None], proof[1])
    return verdict


@pytest.mark.parametrize("error", [1e-2, 1e-6])
def test_the_error_of_a_gram_matrix_is_measured(error):
    batch = MatrixBatch(torch.randn(2, M, N), 0)
    E = torch.randn(2, N, N, dtype=F64)
    E *= error / torch.linalg.matrix_norm(E)[:, None, None]
    bound = certificate.gram_error(batch, batch.gram + E)
    assert (torch.linalg.matrix_norm(E, ord=2) <= bound).all()
    assert (bound <= 5 * error).all()


def test_a_pivot_of_exactly_zero_is_not_above():
    assert count(torch.zeros(3, 3, dtype=torch.float64), 0.0) == 0
    assert count(torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)), 2.0) == 1


@pytest.mark.parametrize("delta", [1e-8, 1e-7, 1e-6])
def test_an_untrustworthy_factor_is_counted_again(delta, monkeypatch):
    """Growth of 1/delta: the count is right because it is measured, and pivoted where the measure says so."""
    G = 0.3 * torch.ones(1, N, N, dtype=F64) + torch.diag_embed(torch.rand(1, N, dtype=F64))
    shift = (G[:, 0, 0] - delta).item()
    eigenvalues = torch.linalg.eigvalsh(G[0])
    room = (eigenvalues - shift).abs().min().item() / 2
    assert count(G[0], shift, room) == (eigenvalues > shift).sum()
    pivoted = []
    monkeypatch.setattr(ldlt, "count_above_pivoted", lambda *_: pivoted.append(1) or 7)
    assert count(G[0], shift, 1e-300) == 7
    assert pivoted
