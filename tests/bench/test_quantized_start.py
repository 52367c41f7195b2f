"""What quantizing loses: the measure, the two orders, and the table."""

import pytest
import torch

from bench import quantized_start as bench


def row(provider, window, rank, ratio, status="ok", quantizer="nf4"):
    shared = {"matrix": "noise", "m": "48", "n": "64", "quantizer": quantizer, "quantized": "0.0925"}
    shared |= {"device": "cpu", "torch": "2", "peft": "3", "bitsandbytes": "4", "torchao": "5"}
    shared |= {"overlap": "0.5" if provider == "ipca" else ""}
    return shared | {"provider": provider, "window": window, "rank": str(rank), "ratio": ratio, "status": status}


def rows(**options):
    arms = [("ipca", window) for window in bench.WINDOWS] + [("peft-pissa", "principal")]
    return [row(*arm, rank, f"0.{rank}", **options) for arm in arms for rank in bench.RANKS]


def test_the_distance_is_relative_and_in_the_frobenius_norm():
    W = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert bench.distance(W, torch.tensor([[3.0, 0.0], [0.0, 1.0]])) == pytest.approx(3 / 5)


@pytest.mark.parametrize("name", bench.QUANTIZERS)
def test_the_residual_of_the_largest_components_loses_less(name):
    pytest.importorskip("torchao" if name == "int4" else "bitsandbytes")
    W = torch.randn(48, 64) + 5 * torch.randn(48, 2) @ torch.randn(2, 64)
    quantize = bench.quantizer(name, 48, 64)
    lost = bench.distance(W, quantize(W))
    assert 0 < lost < 0.2
    starts = [bench.window_weight(W, quantize, "principal", 4)]
    if pytest.importorskip("peft"):
        starts.append(bench.pissa_weight(W, quantize, 4))
    errors = [bench.distance(W, start) for start in starts]
    assert max(errors) < 0.5 * lost
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


def test_the_table_has_a_line_for_each_matrix_and_quantizer():
    text = bench.start_section(rows() + rows(quantizer="int8"))
    assert "| noise 48 × 64 | nf4 | 0.0925 | 0.16 | 0.16 | 0.16 | 0.64 | 0.64 | 0.64 | 0.16 | 0.64 |" in text
    assert "| noise 48 × 64 | int8 |" in text
    assert "cpu; bitsandbytes 4, torchao 5, torch 2, peft 3." in text
    assert "failed" not in text


def test_the_overlap_is_1_of_the_same_window_and_less_of_another():
    W = torch.randn(48, 40)
    other = W + 0.1 * torch.randn(48, 40)
    assert bench.overlap(W, 2 * W, "middle", 4) == pytest.approx(1)
    assert bench.overlap(W, other, "middle", 4) < 0.9
    assert "| noise 48 × 64 | nf4 | 0.0925 | 0.50 |" in bench.overlap_section(rows())


def test_what_did_not_run_is_said():
    text = bench.start_section([*rows(), row("peft-loftq", "", 16, "", status="failed: no GPU")])
    assert "- peft-loftq, nf4: failed: no GPU" in text
