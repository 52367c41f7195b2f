"""What the kernels' results should be: in long double, beside PyTorch's version in the same dtype.

An error may be twice PyTorch's and a few roundings, where a result is ill-conditioned amplified by that.
"""

import numpy as np
import torch

from ipca.svd import inner_loops
from tests.helpers.csrc_inputs import views


def complaints(call, found):
    """What is wrong with the arrays that came out, in words."""
    return list((ldlt_complaints, cholesky_complaints, lanczos_complaints)[call.operation](call, found))


def wide(tensors):
    """Copies in NumPy's long double."""
    return [np.array(t.double().numpy(), dtype=np.longdouble) if torch.is_tensor(t) else t for t in tensors]


def close(what, ours, torchs, truth, rounding):
    """At most twice PyTorch's error and some ``rounding``, relative to the largest entry; both against long double."""
    scale = float(np.abs(truth).max()) or 1.0
    ours, torchs = (float(np.abs(x.double().numpy() - truth).max()) / scale for x in (ours, torchs))
    if not ours <= 2 * torchs + rounding:
        yield f"{what}: error {ours:.1e}, PyTorch's {torchs:.1e}"


def untouched(call, found):
    """What lies between and around the views is as it was."""
    now = [array.clone() for array in found]
    for view, was in zip(views(call, now), views(call, call.arrays), strict=True):
        if torch.is_tensor(view):
            view.copy_(was)
    last = len(now) if call.operation != 1 else 1  # the others are outputs
    for i in range(last):
        if not torch.equal(now[i].view(torch.uint8), call.arrays[i].view(torch.uint8)):
            yield f"array {i} is changed outside of its view"


def ldlt_complaints(call, found):
    panel, growth, positive, tiny = views(call, [array.clone() for array in call.arrays])
    true_panel, true_growth, true_positive, true_tiny = wide((panel, growth, positive, tiny))
    for A, g, count, least in zip(true_panel, true_growth, range(len(true_panel)), true_tiny, strict=True):
        true_positive[count] += ldlt(A, g, least)
    inner_loops.ldlt_panel_(panel.copy_(panel.tril()), growth, positive, tiny)
    eps = torch.finfo(call.dtype).eps
    our_panel, our_growth, our_positive, _ = views(call, found)
    yield from close("L, D", our_panel.tril(), panel.tril(), np.tril(true_panel), 4 * eps)
    yield from close("growth", our_growth, growth, true_growth, 4 * eps)
    if not our_positive.tolist() == positive.tolist() == true_positive.tolist():
        yield f"{our_positive.tolist()} positive pivots, not {true_positive.tolist()}"
    yield from untouched(call, found)


def ldlt(A, growth, tiny):
    """Factorize the ``k`` columns ``A (rows, k)`` in place, add to ``growth``, and count positive pivots."""
    for j in range(A.shape[1]):
        if not abs(A[j, j]) >= tiny:
            A[j, j] = -tiny
        column = A[j + 1 :, j] / A[j, j]
        for m in range(j + 1, A.shape[1]):
            A[m:, m] -= column[m - j - 1 :] * A[m, j]
        A[j + 1 :, j] = column
        growth[j] += abs(A[j, j])
        growth[j + 1 :] += column**2 * abs(A[j, j])
    return int((A.diagonal() > 0).sum())


def cholesky_complaints(call, found):
    (G,), (_, T, shift) = views(call, call.arrays), found
    G = G.tril() + G.tril(-1).mT
    eps, p = torch.finfo(call.dtype).eps, G.shape[-1]
    for one, ours, moved, torchs in zip(G, T, shift.tolist(), inner_loops.scaled_cholesky(G)[1].tolist(), strict=True):
        if not one.isfinite().all():
            if not ours.isnan().all():
                yield "a Gram matrix that is not finite has a factor"
            continue
        allowed = [16 * p * eps * 100**i for i in range(7)] if torchs else [0.0]
        if not any(abs(moved - value) <= 4 * eps * value for value in allowed):
            yield f"shift {moved}, PyTorch's {torchs}"
            continue
        condition = np.sqrt(1 / (moved or 1))
        rounding = 4 * eps * condition
        yield from close("T", ours, plain_inverse(one, moved), true_inverse(one, moved), rounding)
        if ours.tril(-1).any() or ours[:, one.diagonal() == 0].any():
            yield "T is not zero below its diagonal, or where a column is zero"
    yield from untouched(call, found)


def plain_inverse(G, shift):
    """``T`` with the shift given, as :mod:`ipca.svd.inner_loops` has it."""
    diagonal = G.diagonal()
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0)
    C = G * scale * scale[:, None]
    C.diagonal().masked_fill_(diagonal <= 0, 1)
    eye = torch.eye(len(G), dtype=G.dtype)
    K = torch.linalg.cholesky(C + shift * eye)
    return scale[:, None] * torch.linalg.solve_triangular(K.mT, eye, upper=True)


def true_inverse(G, shift):
    """The same in long double."""
    (G,) = wide([G])
    diagonal = G.diagonal()
    scale = np.array([1 / np.sqrt(d) if d > 0 else 0 for d in diagonal], dtype=np.longdouble)
    C = G * scale * scale[:, None] + np.diag(np.where(diagonal > 0, 0, 1) + np.longdouble(shift))
    p = len(C)
    inverse = np.eye(p, dtype=np.longdouble)  # becomes K⁻¹, by elimination
    for j in range(p):
        root = np.sqrt(C[j, j])
        C[j], inverse[j] = C[j] / root, inverse[j] / root
        for i in range(j + 1, p):
            inverse[i] -= C[j, i] * inverse[j]
            C[i] = C[i] - C[j, i] * C[j]
    return scale[:, None] * inverse.T


def lanczos_complaints(call, found):
    basis, product, alpha, beta, step = views(call, [array.clone() for array in call.arrays])
    eps = torch.finfo(call.dtype).eps
    truth, true_alpha, true_beta = lanczos(*wide((basis[: step + 1], product)), 64 * eps)
    before = float(product.norm(dim=-1).max())
    inner_loops.lanczos_step_(basis, product, alpha, beta, step)
    our_basis, _, our_alpha, our_beta, _ = views(call, found)
    amplified = 8 * eps * before / float(true_beta.min() or before)
    yield from close("alpha", our_alpha[:, step], alpha[:, step], true_alpha, 4 * eps)
    yield from close("beta", our_beta[:, step], beta[:, step], true_beta, amplified)
    yield from close("the next vector", our_basis[step + 1], basis[step + 1], truth, amplified)
    overlap = (our_basis[: step + 1].double() * our_basis[step + 1].double()).sum(-1).abs().max()
    if not overlap <= 4 * eps:
        yield f"the next vector overlaps with an earlier one by {overlap:.1e}"
    others = [j for j in range(len(basis)) if j != step + 1]
    if not torch.equal(our_basis[others].nan_to_num(7), basis[others].nan_to_num(7)):
        yield "another vector is changed"
    yield from untouched(call, found)


def lanczos(seen, w, vanished):
    """The next vectors ``(chains, n)``, ``alpha`` and ``beta``."""
    before, alpha = np.sqrt((w**2).sum(-1)), (seen[-1] * w).sum(-1)
    for _ in range(2):
        w = w - ((seen * w).sum(-1)[..., None] * seen).sum(0)
    beta = np.sqrt((w**2).sum(-1))
    beta = np.where(beta > vanished * before, beta, 0)
    return w * (beta > 0)[:, None] / np.where(beta > 0, beta, 1)[:, None], alpha, beta
