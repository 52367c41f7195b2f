import pytest
import torch

from ipca.svd.lanczos import CHAINS, norm_bound, norm_bound_steps, spectral_density
from ipca.svd.matrix_batch import MatrixBatch

F64 = torch.float64
SPECTRA = {
    "even": torch.linspace(2, 1, 600),
    "power law": torch.arange(1, 601) ** -0.5,
    "outliers": torch.cat([torch.linspace(40, 5, 20), torch.linspace(1, 0.1, 580)]),
    "two clusters": torch.cat([torch.linspace(2, 1.9, 300), torch.linspace(1, 0.9, 300)]),
}


def density_of(S):
    Q = torch.linalg.qr(torch.randn(len(S), len(S), dtype=F64))[0]
    return spectral_density(((Q * S.double().square()) @ Q.mT)[None].float(), seed=0)


@pytest.mark.parametrize("S", SPECTRA.values(), ids=SPECTRA)
def test_an_index_is_found_to_a_few_of_its_random_errors(S):
    n, density = len(S), density_of(S)
    for index in (30, 150, 300, 450, 540):
        x = density.value_at(torch.tensor([float(index)])).item()
        assert abs(int((x < S).sum()) - index) <= 4 * (n / (2 * CHAINS)) ** 0.5


def test_values_fall_as_the_index_grows_and_stay_within_the_spectrum():
    density = density_of(SPECTRA["power law"])
    values = [density.value_at(torch.tensor([float(i)])).item() for i in range(0, 601, 20)]
    assert values == sorted(values, reverse=True)
    assert values[-1] >= 0
    assert values[0] <= 1.01


def test_a_matrix_of_few_eigenvalues_exhausts_the_recurrence():
    S = torch.cat([torch.full((200,), 2.0), torch.full((100,), 1.0)])
    density = density_of(S)
    assert density.value_at(torch.tensor([100.0])).item() == pytest.approx(2, rel=1e-2)
    assert density.value_at(torch.tensor([290.0])).item() <= 1.01


def test_each_matrix_of_a_batch_has_its_own_density_and_a_seed_its_own_vectors():
    G = torch.stack([torch.diag(torch.linspace(1, 4, 300)), torch.diag(torch.linspace(9, 16, 300))])
    first, again, other = spectral_density(G, 0), spectral_density(G, 0), spectral_density(G, 1)
    index = torch.tensor([150.0, 150.0])
    assert torch.equal(first.value_at(index), again.value_at(index))
    assert not torch.equal(first.value_at(index), other.value_at(index))
    assert first.value_at(index).tolist() == pytest.approx([2.5**0.5, 12.5**0.5], rel=0.05)


def test_a_batch_forgets_the_float32_copy_before_it_factorizes():
    batch = MatrixBatch(torch.randn(1, 300, 280), 0)
    assert batch.gram.shape == (1, 280, 280)
    assert batch.density.n == 280
    assert "gram32" in vars(batch)
    batch.factorize(batch.sigma1)
    assert "gram32" not in vars(batch)


def test_the_end_of_a_spectrum_far_from_zero_is_found():
    S = torch.linspace(3, 2, 600)
    assert 1.97 <= density_of(S).value_at(torch.tensor([597.0])).item() <= 2.03


@pytest.mark.parametrize("kind", ["even", "one large", "flat", "decaying", "rank 1", "zero"])
@pytest.mark.parametrize("epsilon", [0.5, 0.1, 0.02])
def test_a_norm_bound_is_above_the_norm_by_as_little_as_asked(kind, epsilon):
    n = 200
    values = {
        "even": torch.linspace(1, 0, n),
        "one large": torch.cat([torch.tensor([5.0]), torch.linspace(1, 0, n - 1)]),
        "flat": torch.ones(n),
        "decaying": torch.logspace(0, -6, n),
        "rank 1": torch.eye(n)[0],
        "zero": torch.zeros(n),
    }[kind].double()
    Q = torch.linalg.qr(torch.randn(2, n, n, dtype=F64))[0]
    G = ((Q * values) @ Q.mT).float()
    steps = norm_bound_steps(n, epsilon)
    for seed in range(5):
        found = norm_bound(lambda rows: rows @ G, G, steps, seed)
        assert (found >= (1 - 1e-5) * values[0]).all()
        assert (found <= (1 + 1e-5) * values[0] / (1 - epsilon)).all()
    assert norm_bound_steps(n, epsilon / 4) > steps
