"""The mask is Philox4x32-7 of seed and place: against another implementation of the paper, and in all kernels."""

import numpy as np
import pytest
import torch

from ipca.ops.dropout import apply_dropout, cpu_mask, cpu_mask_op, keep_mask, kernel_mask, new_seed

BOTH = pytest.mark.parametrize("draw", [kernel_mask, cpu_mask], ids=["kernel", "cpu"])


def philox(counter, key, rounds):
    """Philox4x32 as the paper writes it, on Python's integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(rounds):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k1, a & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def test_the_generator_gives_the_known_answers_of_its_paper():
    """Random123's known-answer tests of Philox4x32-7."""
    assert philox((0, 0, 0, 0), (0, 0), 7) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    ones = 0xFFFFFFFF
    assert philox((ones,) * 4, (ones, ones), 7) == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]


@pytest.mark.parametrize("seed", [0, 1, 12345678901234567, 2**63 - 1])
def test_the_mask_is_that_of_the_generator(seed):
    M, K, p = 5, 19, 0.3
    mask = kernel_mask(torch.tensor([seed]), M, K, p)
    for m in range(M):
        for k in range(K):
            word = philox((k // 8, m, 0, 0), (seed & 0xFFFFFFFF, seed >> 32), 7)[k % 8 // 2]
            assert mask[m, k] == ((word >> 16 * (k % 2)) & 0xFFFF >= round(65536 * p))


@BOTH
@pytest.mark.parametrize("p", [0.05, 0.5, 0.95])
def test_how_many_are_dropped(draw, p):
    mask = draw(new_seed(torch.device("cpu")), 400, 1000, p)
    deviation = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs((~mask).double().mean() - p) < 5 * deviation
    assert np.corrcoef(mask[:, :-1].flatten(), mask[:, 1:].flatten())[0, 1] < 0.01


def test_the_scale_keeps_the_expectation_exactly_for_the_probability_in_force():
    x = torch.ones(3, 800, dtype=torch.float64)
    kept = apply_dropout(x, new_seed(x.device), 0.05)
    assert set(kept.unique().tolist()) == {0.0, 65536 / (65536 - round(0.05 * 65536))}
    assert not apply_dropout(x, new_seed(x.device), 1.0).any()


def test_seeds_follow_the_generator_and_differ():
    torch.manual_seed(5)
    one, two = new_seed(torch.device("cpu")), new_seed(torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(one, new_seed(torch.device("cpu")))
    assert not torch.equal(one, two)


@BOTH
@pytest.mark.parametrize(("M", "K"), [(0, 5), (1, 1), (3, 7), (5, 16)])
def test_any_shape_and_the_same_again(draw, M, K):
    seed = torch.tensor([2**62 + 5])
    mask = draw(seed, M, K, 0.5)
    assert mask.shape == (M, K)
    assert torch.equal(mask, draw(seed, M, K, 0.5))


def test_a_cpu_draws_the_cpu_mask_and_its_op_is_sound():
    seed = torch.tensor([77])
    assert torch.equal(keep_mask(torch.empty(5, 9), seed, 0.3), cpu_mask(seed, 5, 9, 0.3))
    torch.library.opcheck(cpu_mask_op, (seed, 5, 9, 0.3))
