"""Initial factors of plain LoRA, of LoRA-Null and of the controls, as :class:`ipca.nn.InitialFactors`."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch import Tensor

from ipca._hashing import tensor_sha256
from ipca.nn.initialization import InitCertificate, InitialFactors
from ipca.svd import SVDReport, WindowSVD
from ipca.window import Window


def layer_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator determined by ``seed`` and the layer's path."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def plain_lora_factors(
    weight: Tensor, rank: int, generator: torch.Generator, *, adapter_dtype: torch.dtype
) -> InitialFactors:
    """Plain LoRA (arXiv 2106.09685) for ``weight (…, out, in)``: random ``A0``; ``B0 = 0``, so ``W_res = W``.

    ``A0`` is uniform in ``±1 / √in``, as in PEFT (Kaiming-uniform with a = √5). LoRA has no window; the result carries
    ``Window(0, rank)`` for its rank, and no SVD report.

    Args:
        weight: ``(…, out, in)``, any float dtype.
        rank: of ``A0 (…, rank, in)`` and ``B0 (…, out, rank)``.
        generator: on the CPU; the same generator gives the same factors on every device.
        adapter_dtype: of the factors.
    """
    *experts, out_features, in_features = weight.shape
    A0 = torch.empty(*experts, rank, in_features, dtype=torch.float64, device="cpu")
    A0.uniform_(-1, 1, generator=generator)
    A0 = (A0 / in_features**0.5).to(weight.dtype).to(device=weight.device, dtype=adapter_dtype)
    B0 = A0.new_zeros(*experts, out_features, rank)
    exact = InitCertificate(str(weight.dtype).removeprefix("torch."), 0.0, 0.0, 0.0)
    return InitialFactors(A0, B0, Window(0, rank), tensor_sha256(weight), None, exact)


def haar(found: WindowSVD, generator: torch.Generator) -> WindowSVD:
    """The singular values of ``found`` on Haar-random directions ``U (m, r)``, ``Vh (r, n)``."""
    U = _orthonormal(found.U, generator)
    Vh = _orthonormal(found.Vh.mT, generator).mT
    return WindowSVD(U, found.S, Vh, _reports(found, "haar", "random directions, unrelated to any component"))


def matched(directions: WindowSVD, magnitudes: WindowSVD) -> WindowSVD:
    """The directions of one window with the singular values of another."""
    what = f"directions of this window, singular values of {magnitudes.report.window}"
    return WindowSVD(directions.U, magnitudes.S, directions.Vh, _reports(directions, "matched", what))


def random_window(rank: int, d: int, generator: torch.Generator) -> Window:
    """A window whose start is uniform over ``0 … d − rank``."""
    return Window(int(torch.randint(d - rank + 1, (), generator=generator, device="cpu")), rank)


def _orthonormal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Haar-random ``(…, m, r)`` with orthonormal columns (Mezzadri, Notices of the AMS 54, 2007)."""
    Q, R = torch.linalg.qr(torch.randn(like.shape, dtype=torch.float64, generator=generator, device="cpu"))
    return (Q * R.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]).to(like)


def _reports(found: WindowSVD, path: str, what: str) -> tuple[SVDReport, ...]:
    return tuple(replace(report, path=path, certified=False, certificate=what) for report in found.reports)
