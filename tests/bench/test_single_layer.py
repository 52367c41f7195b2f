"""The rows of one layer without a CUDA graph and under torch.compile."""

import pytest
import torch

from bench import single_layer
from bench.grid import Cell
from bench.rows import read_rows

CPU, CELL = torch.device("cpu"), Cell(16, 32, 48, rank=4)


def test_buffers_of_the_rows_are_counted():
    code = "buf0 = empty_strided_cuda((16, 48), (48, 1), x)\nbuf1 = empty_strided_cuda((32, 48), (48, 1), x)\n"
    assert single_layer.buffers(code, CELL) == 1
    assert single_layer.buffers(code + "buf2 = empty_strided_cpu((16, 32), (32, 1), x)", CELL) == 2


def test_every_provider_has_its_times_and_kernels_and_is_not_measured_twice(tmp_path):
    path = tmp_path / "rows.csv"
    assert single_layer.eager(CELL, path, CPU, 60, count=1) == 0
    rows = read_rows(path)
    found = {(row["provider"], row["form"]) for row in rows}
    assert found == {(who.name, who.form) for who in single_layer.EAGER}
    for row in rows:
        assert row["status"] == "ok" or row["status"].startswith("refused: it needs a CUDA device")
        assert (row["status"] == "ok") == bool(row["ms"])
    timed = [row for row in rows if row["provider"] == "linear"]
    assert {row["quantity"] for row in timed} == {"wall", "host", "kernel"}
    assert {"aten::mm": "2"}.items() <= {row["name"]: row["calls"] for row in timed}.items()
    assert single_layer.eager(CELL, path, CPU, 60, count=1) == 0
    assert read_rows(path) == rows
    assert len(single_layer.table(rows)) == 2 + len(single_layer.EAGER)


def test_a_call_without_time_leaves_the_rest(tmp_path):
    path = tmp_path / "rows.csv"
    assert single_layer.eager(CELL, path, CPU, 0, count=1) == single_layer.UNFINISHED
    assert {row["provider"] for row in read_rows(path)} == {"linear"}


@pytest.mark.slow
def test_compiled_is_as_right_as_eager(tmp_path):
    path = tmp_path / "rows.csv"
    assert single_layer.compiled(CELL, path, CPU, 300, most=2) == 0
    rows = read_rows(path)
    assert [(row["quantity"], row["status"]) for row in rows] == [("silu", "ok"), ("compiled", "ok")] * 2
    assert all(int(row["calls"]) > 0 for row in rows if row["quantity"] == "compiled")
