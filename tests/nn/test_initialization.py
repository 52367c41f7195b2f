"""A layer's start: factors against a float64 SVD, the certificate, and the low-rank update in blocks."""

import math

import pytest
import torch
from torch import nn

import ipca.nn.initialization
from ipca import Window
from ipca._hashing import tensor_sha256
from ipca.nn import InitCertificate, LinearPC
from ipca.nn.initialization import add_low_rank, certify_init, default_adapter_dtype, initial_factors

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
OPTIONS = {"scaling": 1.0, "form": "residual", "adapter_dtype": torch.float32, "tol": "default"}


def initial_of(weight: torch.Tensor, window: Window | None = None, **options):
    return initial_factors(weight, window or Window.middle(5), **{**OPTIONS, **options})


@pytest.mark.parametrize("scaling", [1.0, 0.25, 8.0])
@pytest.mark.parametrize("window", [Window(0, 5), Window(13, 5), Window(28, 5), Window(0, 33)], ids=str)
@pytest.mark.parametrize("shape", [(33, 48), (48, 33)])
def test_factors_are_the_window_split_evenly(shape, window, scaling):
    weight = torch.randn(shape, dtype=torch.float64)
    start = initial_of(weight, window, scaling=scaling, adapter_dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    inside = slice(window.index, window.index + window.rank)
    wanted = U[:, inside] * S[inside] @ Vh[inside]
    assert start.A0.shape == (window.rank, shape[1])
    assert start.B0.shape == (shape[0], window.rank)
    assert (scaling * start.B0 @ start.A0 - wanted).norm() <= 1e-12 * S[0]
    norms = (S[inside] / scaling).sqrt()
    assert torch.allclose(start.A0.norm(dim=1), norms, rtol=1e-12)
    assert torch.allclose(start.B0.norm(dim=0), norms, rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_survive_the_cast_to_the_compute_dtype(dtype):
    weight = torch.randn(48, 33).to(dtype)
    start = initial_of(weight, adapter_dtype=torch.float64)
    for factor in (start.A0, start.B0):
        assert factor.dtype == torch.float64
        assert torch.equal(factor, factor.to(dtype).double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaling", [0.1, 1.0, 16.0])
def test_certificate_measures_the_error_of_the_start(dtype, scaling):
    weight = torch.randn(48, 33).to(dtype)
    start = initial_of(weight, Window.principal(5), scaling=scaling)
    kept = ipca.nn.initialization.frozen_weight(weight, start.A0, start.B0, scaling=scaling, form="residual")
    assert kept.dtype == dtype
    off = kept.double() + scaling * start.B0.double() @ start.A0.double() - weight.double()
    certificate = start.certificate
    rounding = 2 * torch.finfo(torch.float64).eps * weight.double().abs().max().item()  # the sums' own, in any order
    assert certificate.max_abs == pytest.approx(off.abs().max().item(), rel=1e-6, abs=rounding)
    assert certificate.relative == pytest.approx((off.norm() / weight.double().norm()).item(), rel=1e-6, abs=rounding)
    sums = 2 * 7 * torch.finfo(torch.float64).eps * start.svd.window.rank  # of float64, beside the rounding to dtype
    assert torch.finfo(dtype).eps <= certificate.bound <= (1 + 1e-3) * torch.finfo(dtype).eps + sums
    assert certificate.holds
    assert certificate.dtype == str(dtype).removeprefix("torch.")


def test_start_records_where_it_comes_from():
    weight = torch.randn(48, 33)
    start = initial_of(weight, Window("energy=0.5", 5))
    assert start.window == start.svd.window
    assert 0 < start.window.index < 28
    assert start.base_sha256 == tensor_sha256(weight)
    assert start.svd.certified
    intact = initial_of(weight, form="intact").certificate
    assert intact == InitCertificate("float32", 0.0, 0.0, 0.0)
    assert intact.holds


@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-4, 1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_certificate_holds_at_every_size_of_the_weight(dtype, size):
    weight = (size * torch.randn(48, 33)).to(dtype)
    assert initial_of(weight).certificate.holds


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e30])
def test_certificate_holds_near_the_ends_of_float32(size):
    assert initial_of(torch.randn(48, 33) * size).certificate.holds


EXTREMES = [
    *((size, torch.float32) for size in (1e-30, 1e-23, 1e19, 1e30)),
    *((size, torch.bfloat16) for size in (1e-30, 1e30)),
    *((size, torch.float64) for size in (1e-170, 1e160)),
]


@pytest.mark.parametrize(("size", "dtype"), EXTREMES)
def test_what_is_null_does_not_depend_on_the_size(size, dtype):
    torch.manual_seed(0)
    full, spectrum = torch.randn(24, 32, dtype=torch.float64), torch.cat([torch.linspace(2, 1, 8), torch.zeros(16)])
    U, _, Vh = torch.linalg.svd(full, full_matrices=False)
    deficient = (U * spectrum) @ Vh
    wide = torch.promote_types(dtype, torch.float32)
    for weight, null in ((full, 0), (deficient, 0 if dtype == torch.bfloat16 else 4)):  # whose rounding fills the rank
        start = initial_of((weight * size).to(dtype), Window.minor(4), adapter_dtype=wide)
        assert int((start.B0 == 0).all(0).sum()) == null
    start = initial_of((full * size).to(dtype), adapter_dtype=wide, magnitude=0.5)
    sizes = start.A0.double().norm(dim=1) * start.B0.double().norm(dim=0)
    wanted = 0.5 * float((full * size).to(dtype).double().div(size).norm()) * size / 24**0.5
    assert sizes.tolist() == pytest.approx([wanted] * len(sizes), rel=1e-2)


def test_certificate_fails_for_other_factors():
    weight = torch.randn(2050, 33, dtype=torch.float64)
    start = initial_of(weight, adapter_dtype=torch.float64)
    settings = {"scaling": 1.0, "form": "residual"}
    assert certify_init(weight, start.A0, start.B0, **settings) == start.certificate
    broken = start.A0.clone()
    broken[0, 0] = math.nan
    with pytest.raises(RuntimeError, match=r"off by nan .*float64 explains at most 2\.2e-16"):
        certify_init(weight, broken, start.B0, **settings)
    assert not InitCertificate("float32", 0.0, math.nan, 1e-7).holds


@pytest.mark.parametrize("shape", [(129, 4099), (3, 70, 4099)])
def test_threads_change_no_bit(shape):
    *stack, out, inner = shape
    weight = torch.randn(shape).bfloat16()
    A0, B0 = torch.randn(*stack, 5, inner) / 99, torch.randn(*stack, out, 5) / 99
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(
                (add_low_rank(weight, [(-0.5, B0, A0)]), certify_init(weight, A0, B0, scaling=0.5, form="residual"))
            )
    finally:
        torch.set_num_threads(before)
    wide = weight.double() - 0.5 * B0.double() @ A0.double()
    assert (found[0][0].double() - wide).abs().max() <= torch.finfo(torch.bfloat16).eps * wide.abs().max()
    assert all(torch.equal(one, found[0][0]) and certificate == found[0][1] for one, certificate in found)


@pytest.mark.parametrize("error", [1e-3, 1.0, math.inf])
def test_a_wrong_base_weight_fails_loudly(error, monkeypatch):
    linear = nn.Linear(33, 48)
    before = linear.weight.clone()
    kept = ipca.nn.initialization.frozen_weight

    def planted(weight, *args, **options):
        wrong = kept(weight, *args, **options)
        wrong[-1, -1] += error
        return wrong

    monkeypatch.setattr(ipca.nn.initialization, "frozen_weight", planted)
    with pytest.raises(RuntimeError, match=r"effective weight is off by .* before training.*float32.*please report"):
        LinearPC.from_linear(linear, rank=5, form="residual")
    assert torch.equal(linear.weight, before)
    layer = LinearPC(33, 48, rank=5, form="residual", device="meta")
    with pytest.raises(RuntimeError, match="before training"):
        layer.load_state_dict(linear.state_dict(), assign=True)
    assert layer.window is None


@pytest.mark.parametrize(
    ("weight", "error", "words"),
    [
        (torch.full((8, 8), math.nan), ValueError, "holds NaN or Inf"),
        (torch.eye(8, dtype=torch.int8), TypeError, r"cannot decompose a torch\.int8 tensor; dequantize or cast"),
        (torch.empty(8, 8, device="meta"), ValueError, "meta device"),
        (torch.ones(8), ValueError, r"got shape \(8,\)"),
        (torch.ones(0, 8), ValueError, r"at least one entry, got shape \(0, 8\)"),
        (torch.ones(4, 8), ValueError, "needs 5 singular values, but there are only 4; lower the rank"),
    ],
    ids=["nan", "int8", "meta", "vector", "empty", "small"],
)
def test_weights_that_cannot_start(weight, error, words):
    with pytest.raises(error, match=words):
        initial_of(weight)


@pytest.mark.parametrize(
    ("dtype", "wanted"), list(zip(DTYPES, [torch.float32, torch.float32, torch.float32, torch.float64], strict=True))
)
def test_default_adapter_dtype(dtype, wanted):
    assert default_adapter_dtype(dtype) == wanted


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 1023, 1024, 1025, 2049])
def test_low_rank_update_in_blocks_rounds_once(rows, dtype):
    weight, B, A = torch.randn(7, rows).mT, torch.randn(rows, 3), torch.randn(7, 3).mT
    terms = [(0.3, B, A), (-2.0, B.flip(1), A.bfloat16())]
    before = weight.clone()
    wide = weight.double() + sum(c * b.double() @ a.double() for c, b, a in terms)
    found = add_low_rank(weight, terms, dtype)
    wanted = wide.to(dtype or torch.float32)
    assert found.dtype == wanted.dtype
    assert (found.double() - wide).abs().max() <= torch.finfo(wanted.dtype).eps * wide.abs().max()
    assert torch.equal(add_low_rank(weight, []), before)
    assert torch.equal(weight, before)
    assert not add_low_rank(weight.requires_grad_(), terms).requires_grad


def test_null_components_do_not_depend_on_the_default_device():
    weight = torch.zeros(12, 20)
    options = {"scaling": 1.0, "form": "intact", "adapter_dtype": torch.float32, "tol": "default"}
    expected = initial_factors(weight, Window.middle(3), **options)
    with torch.device("meta"):
        found = initial_factors(weight, Window.middle(3), **options)
    assert torch.equal(found.A0, expected.A0)
    assert found.A0.any()
