"""Orthonormal bases of blocks of columns by Cholesky QR: products and one small factorization a pass."""

from __future__ import annotations

from torch import Tensor

from ipca.svd.inner_loops import scaled_cholesky

_PASSES = 6
_BENIGN = 10.0


def orthonormalize(X: Tensor, against: Tensor | None = None) -> Tensor:
    """An orthonormal basis of the columns of ``X (batch, n, p)``, orthogonal to those of ``against (batch, n, q)``.

    At least two passes of projection and scaled Cholesky QR, and more until one enlarges no column much: what a pass
    enlarges are the rounding errors too. Columns that vanish under the projection come back as what rounding left of
    them, made orthonormal: directions as good as random.
    """
    for done in range(_PASSES):
        if against is not None:
            X = X - against @ (against.mT @ X)
        T, _ = scaled_cholesky(X.mT @ X)
        X = X @ T
        if done and bool(T.abs().amax() <= _BENIGN):
            break
    return X
