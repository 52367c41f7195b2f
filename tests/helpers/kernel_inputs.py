"""Inputs for kernel tests, on a GPU where there is one, else for Triton's interpreter; and the twice-PyTorch rule."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.runtime import interpreter

from ipca.kernels.configs import CONFIGS, fitting
from ipca.kernels.launch import has_descriptors
from ipca.kernels.tuning import force, limits

if triton.__version__.startswith("3.6."):  # its interpreter takes arrays of one entry for integers, NumPy 2.4 does not
    _patch = interpreter._patch_lang_tensor

    def _patch_index(tensor, scope):
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_index

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_gpu = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=on_gpu)]
# M, N, K, R: odd first; one row; rank above a block of components; aligned for TMA
SHAPES = [(37, 70, 133, 5), (1, 1, 1, 1), (3, 40, 24, 17), (130, 72, 136, 70), (64, 128, 64, 16)]
PLACES = [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32)]
PLACES += [pytest.param(torch.bfloat16, factors, marks=on_gpu) for factors in (torch.bfloat16, torch.float32)]


def draw(M, N, K, R, dtype=torch.float32, factors=None):
    """Random tensors under their names; ``factors`` is the dtype of A, B, A0, B0."""
    factors = factors or dtype

    def normal(*shape, of=dtype, scale=1.0):
        return (scale * torch.randn(*shape, dtype=torch.float64)).to(of).to(DEVICE)

    return SimpleNamespace(
        x=normal(M, K),
        dy=normal(M, N),
        weight=normal(N, K, scale=K**-0.5),
        bias=normal(N),
        A=normal(R, K, of=factors, scale=K**-0.5),
        A0=normal(R, K, of=factors, scale=K**-0.5),
        B=normal(N, R, of=factors, scale=R**-0.5),
        B0=normal(N, R, of=factors, scale=R**-0.5),
        h=normal(M, R),
        g=normal(M, R),
    )


def every_configuration(*kernels):
    """Parameters ``kernel, kind, config``."""
    cases = [(kernel, kind, config) for (kernel, kind), configs in CONFIGS.items() for config in configs]
    return pytest.mark.parametrize(
        ("kernel", "kind", "config"), [case for case in cases if case[0] in kernels], ids=str
    )


@contextmanager
def configured(kernel, kind, config, R, **hard):
    """Within it ``kernel`` runs as ``config`` says; yields the dtype of ``kind``. Skips what the device cannot hold."""
    device = torch.device(DEVICE)
    without_tma = device.type == "cuda" and not has_descriptors(device)
    if (without_tma and hard.get("tma")) or config not in fitting(kernel, kind, R, limits(device), **hard):
        pytest.skip(f"{config.describe()} {hard or ''} is not for this device")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        with force(kernel, config):
            yield {"16-bit": torch.bfloat16 if DEVICE == "cuda" else torch.float16}.get(kind, torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)


def wide(*tensors):
    """The same values in float64."""
    return [None if t is None else t.double() for t in tensors]


def assert_within_twice(got, plain, exact):
    """The error of ``got`` is at most twice that of ``plain``, both against ``exact``; NaN never passes."""
    assert got.dtype == plain.dtype
    assert got.shape == plain.shape
    error, allowed = (got.double() - exact).norm(), 2 * (plain.double() - exact).norm()
    # Where PyTorch happens to be exact; of a handful of numbers its error is luck, so one rounding is always allowed.
    floor = torch.finfo(got.dtype if got.numel() < 16 else torch.float32).eps * 4 * exact.norm()
    assert error <= max(allowed, floor), f"{error:.3g} is above {allowed:.3g}"


def strided(tensor, how):
    """The same values in another layout."""
    if how == "transposed":
        return tensor.t().contiguous().t()
    if how == "every other row" or (how == "every other column" and tensor.ndim == 1):
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], 1).flatten(0, 1)[::2]
    if how == "every other column":
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], 2).flatten(1)[:, ::2]
    if how == "expanded":
        return tensor[:1].expand_as(tensor)
    return tensor


LAYOUTS = ["contiguous", "transposed", "every other row", "every other column"]


@contextmanager
def poisoned():
    """Memory that PyTorch hands out uninitialized is NaN: an output that is not written cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
