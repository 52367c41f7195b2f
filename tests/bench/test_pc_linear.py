import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import linear

import ipca
from bench import checks, timing
from bench import pc_linear as bench
from bench import rows as bench_rows
from bench.grid import Cell, cells_for
from bench.providers import FORMS, Provider, Sample, active, layer_call, providers_for

CPU = torch.device("cpu")
CELL = Cell(24, 40, 32, rank=4, dtype="float32")
PEFT = Provider("peft-default")


def cell_rows(cell=CELL, seconds=1e-3):
    return bench.bench_cell(cell, CPU, seconds)


def planted(monkeypatch, change, provider=PEFT):
    """``provider`` computes ``change(y)`` instead of ``y``."""

    def changed(asked, sample):
        layer = layer_call(asked, sample)
        return (lambda x: change(layer(x))) if asked == provider else layer

    monkeypatch.setattr(checks, "layer_call", changed)
    monkeypatch.setattr(bench, "layer_call", changed)


def test_every_provider_has_a_row_of_the_schema_for_each_mode():
    rows = cell_rows()
    names = [(row["mode"], row["provider"], row["form"]) for row in rows]
    ours = [(f"ipca-{name}", form) for name in ("triton", "addmm", "merged", "reference", "auto") for form in FORMS]
    expected = [(mode, *who) for mode in bench.MODES for who in [("linear", ""), ("peft-default", ""), *ours]]
    assert sorted(names) == sorted(expected)
    for row in rows:
        assert row.keys() <= set(bench.COLUMNS)
        assert (row["M"], row["N"], row["K"], row["rank"], row["dtype"]) == (24, 40, 32, 4, "float32")


def test_a_row_that_is_ok_is_timed_and_every_other_says_why_it_is_not():
    for row in cell_rows():
        if row["provider"] == "ipca-triton":
            assert row["status"].startswith("refused: it needs a CUDA device")
        else:
            assert row["status"] == "ok"
        assert ("median_ms" in row) == (row["status"] == "ok")
        if row["status"] == "ok":
            assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
            assert row["timer"] == "clock"
            ran = {"ipca-auto": "reference", "linear": "", "peft-default": ""}
            assert row["backend"] == ran.get(row["provider"], row["provider"].removeprefix("ipca-"))


def test_ratios_are_to_the_layer_that_their_column_names():
    rows = {(row["mode"], row["provider"]): row for row in cell_rows() if not row["form"]}
    for mode in bench.MODES:
        assert float(rows[mode, "linear"]["ratio_linear"]) == 1
        assert float(rows[mode, "peft-default"]["ratio_peft_default"]) == 1
        assert float(rows[mode, "linear"]["ratio_peft_default"]) < 1 < float(rows[mode, "peft-default"]["ratio_linear"])
        assert rows[mode, "linear"]["ratio_peft_bf16"] == ""


def test_sixteen_bits_have_three_arms_of_peft():
    names = [provider.name for provider in providers_for(replace(CELL, dtype="bfloat16")) if not provider.form]
    assert names == ["linear", "peft-bf16", "peft-autocast", "peft-default"]
    rows = cell_rows(replace(CELL, dtype="bfloat16"))
    assert {row["status"] for row in rows if not row["form"] or row["provider"] == "ipca-auto"} == {"ok"}
    assert all(row["ratio_peft_autocast"] for row in rows if row["status"] == "ok")


def test_the_arms_hold_the_factors_that_they_name():
    sample = Sample(replace(CELL, dtype="bfloat16"), CPU, 0)
    dtypes = {
        name: {p.dtype for p in sample.layer(Provider(name)).parameters() if p.requires_grad}
        for name in ("peft-bf16", "peft-autocast", "peft-default")
    }
    assert dtypes == {
        "peft-bf16": {torch.bfloat16},
        "peft-autocast": {torch.float32},
        "peft-default": {torch.float32},
    }


def test_dropout_is_on_while_timed():
    sample = Sample(replace(CELL, dropout=0.5), CPU, 0)
    truth = checks.truth_of(sample, "residual")
    for provider in (PEFT, Provider("ipca-auto", "residual")):
        with active(provider):
            assert checks.check(provider, sample, truth) == ""
            y = layer_call(provider, sample)(sample.x)
        assert not torch.allclose(y.double(), truth.exact["y"], atol=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda y: y * 1.001, "wrong: y is off by"),
        (lambda y: y + 0.001 * (y - y.detach()), "wrong: dx is off by"),
        (lambda y: y / 0, "wrong: y is not finite"),
    ],
)
def test_a_wrong_provider_is_not_timed(monkeypatch, change, words):
    planted(monkeypatch, change)
    rows = cell_rows()
    for row in rows:
        if row["provider"] == "peft-default":
            assert row["status"].startswith(words)
            assert "median_ms" not in row
        elif row["status"] == "ok":
            assert row["ratio_peft_default"] == ""
            assert row["ratio_linear"]


@pytest.mark.parametrize("missing", ["low rank", "frozen pair", "factor gradient"])
def test_the_check_sees_what_is_missing(monkeypatch, missing):
    sample = Sample(CELL, CPU, 0)
    layer = sample.layer(Provider("ipca-auto", "intact"))
    kept, A, B = layer.base_weight, layer.lora_A, layer.lora_B
    wrong = {
        "low rank": lambda x: linear(x, kept) + 0 * linear(linear(x, A), B),
        "frozen pair": lambda x: linear(x, kept) + linear(linear(x, A), B),
        "factor gradient": lambda x: checks.plain(x, kept, A, 0.9 * B + 0.1 * B.detach(), layer.lora_A0, layer.lora_B0),
    }
    monkeypatch.setattr(checks, "layer_call", lambda provider, sample: wrong[missing])
    words = checks.check(Provider("ipca-auto", "intact"), sample, checks.truth_of(sample, "intact"))
    assert words.startswith("dB is off" if missing == "factor gradient" else "y is off")


def test_one_that_breaks_leaves_the_others_their_rows(monkeypatch):
    def broken(y):
        raise RuntimeError("out of paper\nand more")

    planted(monkeypatch, broken)
    rows = cell_rows()
    assert {row["status"] for row in rows if row["provider"] == "peft-default"} == {
        "failed: RuntimeError: out of paper"
    }
    assert all(row["median_ms"] for row in rows if row["provider"] == "linear")


def test_the_backend_is_set_around_each_run_and_given_back(monkeypatch):
    seen, before = [], ipca.set_backend("auto")
    monkeypatch.setattr(ipca, "set_backend", lambda name: seen.append(name) or "before")
    with active(Provider("ipca-merged", "intact")):
        assert seen == ["merged"]
    assert seen == ["merged", "before"]
    with active(PEFT):
        assert seen == ["merged", "before"]
    monkeypatch.undo()
    ipca.set_backend(before)


def grid_of(monkeypatch, count, seconds=0.0):
    """``count`` cells, and the list of those that are measured, each in ``seconds`` and one row."""
    measured = []

    def one_row(cell, device, rounds):
        measured.append(cell)
        time.sleep(seconds)
        return [bench.new_row(cell, "full", PEFT, "ok")]

    monkeypatch.setattr(bench, "bench_cell", one_row)
    return [replace(CELL, M=8 * (k + 1)) for k in range(count)], measured


def test_a_second_call_measures_what_is_missing(monkeypatch, tmp_path):
    cells, measured = grid_of(monkeypatch, 3)
    path = tmp_path / "new" / "rows.csv"
    assert bench.run_grid(cells[:2], path, CPU, seconds=60)
    assert bench.run_grid(cells, path, CPU, seconds=60)
    assert measured == cells
    rows = bench_rows.read_rows(path)
    assert [row["M"] for row in rows] == ["8", "16", "24"]
    assert rows[0].keys() == set(bench.COLUMNS)
    assert rows[0]["torch"] == torch.__version__


@pytest.mark.parametrize("column", ["commit", "device"])
def test_another_commit_or_device_is_measured_again(monkeypatch, tmp_path, column):
    cells, measured = grid_of(monkeypatch, 1)
    bench.run_grid(cells, tmp_path / "rows.csv", CPU, seconds=60)
    other = {**bench_rows.facts(CPU), column: "another"}
    monkeypatch.setattr(bench, "facts", lambda device: other)
    bench.run_grid(cells, tmp_path / "rows.csv", CPU, seconds=60)
    assert measured == cells * 2


def test_cells_with_and_without_compilation_are_not_taken_for_each_other(monkeypatch, tmp_path):
    (cell,), measured = grid_of(monkeypatch, 1)
    bench.run_grid([cell], tmp_path / "rows.csv", CPU, seconds=600)
    bench.run_grid([cell, replace(cell, compiled=True)], tmp_path / "rows.csv", CPU, seconds=600)
    assert measured == [cell, replace(cell, compiled=True)]


def test_the_deadline_stops_before_a_cell_that_would_pass_it(monkeypatch, tmp_path):
    cells, measured = grid_of(monkeypatch, 3, seconds=0.2)
    assert not bench.run_grid(cells, tmp_path / "rows.csv", CPU, seconds=0)
    assert measured == []
    assert not bench.run_grid(cells, tmp_path / "rows.csv", CPU, seconds=0.3)
    assert measured == cells[:1]


def test_the_exit_status_says_that_cells_are_left(monkeypatch, tmp_path):
    cells, measured = grid_of(monkeypatch, 2)
    assert bench.measure_cells(cells, tmp_path, CPU, 0) == bench.UNFINISHED
    assert bench.measure_cells(cells, tmp_path, CPU, 60) == 0
    assert measured == cells


def test_a_lost_device_is_recorded_and_the_next_call_goes_on(monkeypatch, tmp_path):
    def lost(device):
        raise RuntimeError("unspecified launch failure")

    def broken(y):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(bench, "synchronize", lost)
    planted(monkeypatch, broken)
    with pytest.raises(bench.DeviceLostError):
        bench.run_grid([CELL], tmp_path / "rows.csv", CPU, seconds=60)
    (row,) = bench_rows.read_rows(tmp_path / "rows.csv")
    assert (row["provider"], row["status"]) == ("peft-default", "failed: RuntimeError: illegal memory access")
    bench.run_grid([CELL], tmp_path / "rows.csv", CPU, seconds=60)
    assert bench_rows.read_rows(tmp_path / "rows.csv") == [row]


def test_a_device_lost_while_timing_is_recorded_too(monkeypatch, tmp_path):
    def lost(*arguments):
        raise RuntimeError("unspecified launch failure\nand more")

    monkeypatch.setattr(bench, "measure", lost)
    with pytest.raises(bench.DeviceLostError):
        bench.run_grid([CELL], tmp_path / "rows.csv", CPU, seconds=60)
    (row,) = bench_rows.read_rows(tmp_path / "rows.csv")
    assert (row["provider"], row["status"]) == ("any", "failed: while forward was timed: unspecified launch failure")


@pytest.mark.parametrize("wrong", [False, True])
def test_the_command_says_by_its_status_whether_all_were_right(monkeypatch, tmp_path, capsys, wrong):
    if wrong:
        planted(monkeypatch, lambda y: y * 2)
    monkeypatch.setattr(bench, "cells_for", lambda device: [CELL])
    monkeypatch.setitem(bench.SECONDS, "cpu", 1e-3)
    monkeypatch.setattr(sys, "argv", ["pc_linear.py", "--out", str(tmp_path), "--device", "cpu"])
    assert bench.main() == int(wrong)
    said = capsys.readouterr()
    assert "| 24 | 40 × 32 | 4 | 0.0 |" in said.out
    assert ("peft-default  wrong: y is off" in said.err) == wrong
    assert (tmp_path / "pc_linear_cpu.csv").exists()


def test_compiled_rows_are_those_of_compiled_layers(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: compiled.append(options) or module)
    rows = cell_rows(replace(CELL, compiled=True))
    assert {(row["provider"], row["form"]) for row in rows} == {
        ("peft-default", ""),
        *(("ipca-auto", f) for f in FORMS),
    }
    assert {row["compiled"] for row in rows} == {1}
    assert compiled
    assert all(row["ratio_peft_default"] and row["ratio_linear"] for row in rows)


def test_the_gpu_grid_begins_with_the_goal_and_names_every_cell_once():
    cells = cells_for("cuda")
    assert cells[0] == Cell(8192, 4096, 4096, rank=16, dropout=0.0, dtype="bfloat16")
    assert len(set(cells)) == len(cells) == 4 * 5 * 4 * 2 + 4
    assert sum(cell.compiled for cell in cells) == 4
    assert [cell.M for cell in cells[1:5]] == [4096, 16384, 1024, 256]
    assert all(cell.dtype == "float32" for cell in cells_for("cpu"))
    assert cells_for("cpu")[0] == Cell(512, 1024, 1024, dtype="float32")


def test_inputs_are_random_and_come_from_the_seed():
    samples = [Sample(CELL, CPU, seed) for seed in (0, 0, 1)]
    drawn = [(sample.x, sample.dy, sample.weight, *sample.moved) for sample in samples]
    for value, again, other in zip(*drawn, strict=True):
        assert torch.equal(value, again)
        assert not torch.equal(value, other)
        assert value.count_nonzero() == value.numel()


def test_saved_bytes_count_each_storage_once_and_not_what_exists():
    x, w = torch.randn(64, 16, requires_grad=True), torch.randn(16, requires_grad=True)

    def forward():
        y = (x * w).exp()  # saves x, w and y
        return (y * y[:32].repeat(2, 1)).sum()  # saves y again and a copy of its size

    y_size = 64 * 16 * 4 / 2**20
    assert timing.saved_mib(forward, [x, w]) == 2 * y_size
    assert timing.saved_mib(forward, [w]) == 3 * y_size


def test_a_frozen_linear_saves_nothing_beside_its_weight():
    saved = {
        row["provider"]: row["saved_mib"]
        for row in cell_rows(Cell(512, 64, 512, 64, dtype="float32"))
        if row["mode"] == "full" and row["form"] != "intact" and row["status"] == "ok"
    }
    assert saved["linear"] == "0.00"
    assert float(saved["peft-default"]) == pytest.approx(512 * 64 * 4 / 2**20, abs=0.01)  # h


def test_a_rotation_is_larger_than_three_caches(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50 * 2**20))
    gpu = torch.device("cuda")
    for size in (10**6, 5 * 2**20, 10**8, 10**9):
        count = timing.rotation(size, gpu)
        assert count * size > 150 * 2**20
        assert count >= 2
    assert timing.rotation(10**6, CPU) == 1


def test_every_round_runs_all_and_a_ratio_is_that_of_pairs():
    log = []
    runners = [timing.Runner(lambda k=k: log.append(k), 1, "clock", nullcontext) for k in range(4)]
    times = timing.measure(runners, CPU, seconds=0)
    rounds = [log[k : k + 4] for k in range(0, len(log), 4)]
    assert len(rounds) == timing.LEAST_ROUNDS + 1
    assert all(sorted(one) == [0, 1, 2, 3] for one in rounds)
    assert len(set(map(tuple, rounds))) > 1
    assert all(len(time.rounds) == timing.LEAST_ROUNDS for time in times)
    drifting, twice = timing.Timing((1.0, 5.0, 3.0)), timing.Timing((2.0, 5.0, 9.0))
    assert twice.ratio(drifting) == 2
    assert drifting.quantile(0.5) == 3


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"),
        ("AMD Instinct", "amd-instinct"),
        ("cpu x86_64, 2 threads", "cpu"),
    ],
)
def test_a_file_name_says_the_device(name, slug):
    assert bench_rows.slug(name) == slug


def test_the_commit_says_when_the_sources_differ_from_it(monkeypatch):
    answers = {"rev-parse": "abcdef0123", "status": ""}
    monkeypatch.setattr(bench_rows, "_git", lambda verb, *rest: answers[verb])
    assert bench_rows.commit.__wrapped__() == "abcdef0123"
    answers["status"] = " M ipca/nn/linear.py"
    assert bench_rows.commit.__wrapped__().startswith("abcdef0123+")
    answers["rev-parse"] = None
    assert bench_rows.commit.__wrapped__().startswith("sources-")
    monkeypatch.setenv("IPCA_COMMIT", "named")
    assert bench_rows.commit.__wrapped__() == "named"


@pytest.mark.gpu
def test_on_a_gpu_every_mode_of_every_layer_is_captured_and_right():
    gpu = torch.device("cuda")
    with timing.side_stream(gpu):
        rows = bench.bench_cell(Cell(300, 512, 256, dropout=0.1), gpu, 1e-3)
    merged = [row for row in rows if row["provider"] == "ipca-merged"]
    assert all(row["status"].startswith("refused: dropout") for row in merged)
    others = [row for row in rows if row not in merged]
    assert {row["status"] for row in others} == {"ok"}
    assert {row["timer"] for row in others} == {"graph"}
    assert all(float(row["peak_mib"]) > 0 for row in others)


@pytest.mark.gpu
def test_what_cannot_be_captured_is_timed_with_events_and_harms_no_later_capture():
    gpu = torch.device("cuda")
    x = torch.randn(64, 64, device=gpu)
    with timing.side_stream(gpu):
        stuck = timing.runner([lambda: torch.nn.functional.dropout(x).sum().item()], gpu, 1e-4)
        assert stuck.timer == "events"
        assert torch.rand(4, device=gpu).unique().numel() > 1
        free = timing.runner([lambda: torch.nn.functional.dropout(x @ x)], gpu, 1e-4)
        assert free.timer == "graph"
        assert free.calls == 5
        times = timing.measure([stuck, free], gpu, seconds=0)
    assert all(0 < ms < 1e3 for time in times for ms in time.rounds)


@pytest.mark.gpu
def test_a_replayed_graph_does_the_work_it_is_timed_for():
    gpu = torch.device("cuda")
    sums = [torch.zeros((), device=gpu) for _ in range(2)]
    with timing.side_stream(gpu):
        runner = timing.runner([lambda s=s: s.add_(1) for s in sums], gpu, 1.0)
        before = [float(s) for s in sums]
        runner.run()
        timing.synchronize(gpu)
        assert [float(s) for s in sums] == [value + 1 for value in before]
