import sys
from dataclasses import replace

import pytest
import torch

import ipca
from bench import bench_window_svd as bench
from bench import plots, report, svd_grid, svd_initialize, svd_matrices, svd_providers, svd_race, svd_tables
from bench import rows as facts
from bench.svd_grid import OURS, YARDSTICK, Cell
from ipca.svd import solve as solving
from ipca.svd.eigensolvers import Tridiagonal

CPU = torch.device("cpu")
TINY = Cell(96, 64, "outliers", 16, rounds=2)
MODEL = Cell(96, 64, "outliers", 4, svd_grid.NAMED, "initialize", rounds=1)


def run(cells, path, seconds=60.0):
    bench.run_grid(cells, path, CPU, seconds)
    return facts.read_rows(path)


def by_task(rows):
    return {(row["window"], row["provider"]): row for row in rows}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return run([TINY, MODEL], tmp_path_factory.mktemp("tiny") / "window_svd_cpu.csv")


def test_every_window_and_provider_has_a_row_of_the_schema(tiny):
    rows = [row for row in tiny if row["op"] == "window_svd"]
    assert list(by_task(rows)) == svd_grid.tasks(TINY, "cpu")
    for row in rows:
        assert tuple(row) == bench.COLUMNS
        assert row["status"].split(":")[0] in ("ok", "inexact", "refused")
        assert bool(row["median_s"]) == (not row["status"].startswith("refused"))
        assert row["torch"] == torch.__version__
        assert row["scipy"]
    ours = by_task(rows)["middle", OURS]
    assert (ours["path"], ours["start"], ours["index_errors"], ours["certified"]) == ("gram_eigh", "24", "0", "1")
    assert float(ours["residual"]) < 1e-6
    assert float(ours["flops"]) > 0
    assert float(ours["best_s"]) <= float(ours["median_s"])
    assert int(ours["rounds"]) >= TINY.rounds
    assert by_task(rows)["middle", "ipca-gram_eigh"]["status"] == "refused: ipca has chosen this path"
    assert {row["path"] for row in rows if row["provider"] == "ipca-interior" and row["path"]} == {"interior"}


def test_what_computes_all_components_is_timed_once_and_judged_in_every_window(tiny):
    rows = [row for row in tiny if row["provider"] == YARDSTICK]
    assert len(rows) == 5
    assert len({row["median_s"] for row in rows}) == 1
    assert len({row["angle"] for row in rows}) == 5
    assert {(row["ratio"], row["ratio_best"]) for row in rows} == {("1.0000", "1.0000")}


def test_rivals_that_are_exact_say_so_and_a_sketch_does_not(tiny):
    rows = by_task(row for row in tiny if row["op"] == "window_svd")
    for name in (YARDSTICK, svd_grid.EIGH, svd_grid.RANGE):
        assert {rows[window, name]["status"] for window in svd_grid.WINDOWS} == {"ok"}
    for name in (svd_grid.LOWRANK, svd_grid.RANDOMIZED, svd_grid.ARPACK, svd_grid.PROPACK):
        assert rows["principal", name]["median_s"]
        assert ("middle", name) not in rows
    assert {rows["principal", name]["status"] for name in (svd_grid.ARPACK, svd_grid.PROPACK)} == {"ok"}
    sketch = svd_matrices.Accuracy(0.1, 1.5, 3)
    assert bench.verdict(svd_grid.LOWRANK, sketch, 8) == "inexact: 3 of 8 are other components"
    with pytest.raises(svd_providers.Refused, match="the window ends beyond d / 2"):
        svd_providers.provider(svd_grid.LOWRANK, torch.zeros(1, 4, 4), ipca.Window(1, 2))


def test_whole_models_get_the_windows_that_they_ask_for(tiny):
    rows = by_task(row for row in tiny if row["op"] == "initialize")
    assert list(rows) == svd_grid.tasks(MODEL, "cpu")
    exact = [(window, OURS) for window in svd_grid.NAMED] + [("principal", "peft-pissa"), ("minor", "peft-mica")]
    for task in exact:
        assert (rows[task]["status"], rows[task]["index_errors"]) == ("ok", "0")
        assert float(rows[task]["angle"]) < 1e-3
    assert rows["principal", "peft-pissa"]["ratio"] == "1.0000"
    assert rows["middle", OURS]["matrices"] == "4 × 64 × 64, 2 × 96 × 64"
    assert rows["middle", OURS]["certified"] == "1"


def test_a_second_call_measures_what_is_missing_and_nothing_else(monkeypatch, tmp_path):
    path = tmp_path / "window_svd_cpu.csv"
    claim = replace(TINY, windows=("middle",), only=(OURS, YARDSTICK))
    assert len(run([claim], path)) == 2
    measured = []
    cell_of = bench.bench_cell

    def counted(cell, wanted, device):
        measured.append((cell, list(wanted)))
        return cell_of(cell, wanted, device)

    monkeypatch.setattr(bench, "bench_cell", counted)
    cells = [replace(TINY, windows=("middle", "minor"), only=(OURS, YARDSTICK, svd_grid.RANGE)), claim]
    rows = run(cells, path)
    left = [("middle", svd_grid.RANGE), *(("minor", name) for name in (OURS, YARDSTICK, svd_grid.RANGE))]
    assert measured == [(cells[0], left)]
    assert len(rows) == len(by_task(rows)) == 6
    assert by_task(rows)["middle", svd_grid.RANGE]["ratio"]  # its yardstick ran again, and has no second row
    assert run(cells, path) == rows
    assert len(measured) == 1


def test_the_deadline_stops_before_a_cell_that_would_pass_it(tmp_path, capsys):
    assert run([TINY, MODEL], tmp_path / "none.csv", seconds=-1) == []
    cells = [replace(TINY, windows=("middle",)), replace(TINY, m=10**7, windows=("middle",))]
    rows = run(cells, tmp_path / "one.csv", seconds=30)
    assert {row["m"] for row in rows} == {"96"}
    assert "out of time: 1 of 2 cells are left" in capsys.readouterr().out


def test_ours_is_judged_before_anything_is_timed(monkeypatch, tmp_path):
    def shifted(W, window, **options):
        return window_svd(W, ipca.Window(window.index + 1, window.rank), **options)

    window_svd = ipca.window_svd
    monkeypatch.setattr(ipca, "window_svd", shifted)
    rows = by_task(run([replace(TINY, windows=("middle",), only=(OURS, YARDSTICK))], tmp_path / "window_svd_cpu.csv"))
    assert rows["middle", OURS]["status"] == "wrong: 16 of 16 are other components"
    assert (rows["middle", OURS]["index_errors"], rows["middle", OURS]["median_s"]) == ("16", "")
    assert rows["middle", YARDSTICK]["median_s"]


def test_a_large_residual_is_wrong_too():
    exact = svd_matrices.Accuracy(1e-7, 1e-3, 0)
    assert bench.verdict("ipca-top", exact, 8) == "ok"
    for residual in (2e-6, float("nan")):
        assert bench.verdict(OURS, replace(exact, residual=residual), 8).startswith("wrong: residual")
        assert bench.verdict(YARDSTICK, replace(exact, residual=residual), 8) == "ok"


def test_a_provider_that_raises_leaves_the_rest_their_turn(monkeypatch, tmp_path):
    def broken(*arguments):
        raise RuntimeError("no luck\nat all")

    monkeypatch.setattr(svd_providers, "scipy_range", broken)
    rows = by_task(run([replace(TINY, windows=("middle",))], tmp_path / "window_svd_cpu.csv"))
    assert rows["middle", svd_grid.RANGE]["status"] == "failed: RuntimeError: no luck"
    assert rows["middle", OURS]["median_s"]


def test_a_lost_device_leaves_a_row_and_the_next_call_goes_on(monkeypatch, tmp_path):
    def lost(*arguments):
        raise RuntimeError("device-side assert")

    path = tmp_path / "window_svd_cpu.csv"
    cell = replace(TINY, windows=("middle",))
    with monkeypatch.context() as broken:
        broken.setattr(svd_providers, "scipy_range", lost)
        broken.setattr(bench, "synchronize", lost)
        with pytest.raises(bench.DeviceLostError):
            run([cell], path)
    (row,) = facts.read_rows(path)
    assert (row["provider"], row["status"]) == (svd_grid.RANGE, "failed: RuntimeError: device-side assert")
    rows = run([cell], path)
    assert list(map(tuple, sorted(by_task(rows)))) == sorted(svd_grid.tasks(cell, "cpu"))


def test_weights_that_are_not_installed_are_left_out_in_words(monkeypatch, tmp_path, capsys):
    def missing():
        raise ImportError("the demo needs transformers")

    monkeypatch.setattr(svd_matrices, "minilm", missing)
    assert run([Cell(384, 384, "minilm query", 16)], tmp_path / "window_svd_cpu.csv") == []
    assert "minilm query r=16 is left out: the demo needs transformers" in capsys.readouterr().out


def test_one_path_by_force_and_the_plan_as_before():
    plan = solving.plan
    W = svd_matrices.matrix(64, 64, "gaussian", CPU, 1)
    for path in ("top", "interior", "bottom", "tridiagonal", "gram_eigh", "full"):
        window = ipca.Window("minor" if path == "bottom" else "principal", 8).resolve(64)
        (found,) = svd_providers.forced(path, W, window)
        assert found.report.path == path
    assert solving.plan is plan


def test_a_path_that_is_not_good_enough_is_refused(monkeypatch):
    def poor(solver, wanted):
        return exact(solver, wanted).roll(1, dims=1)

    exact = Tridiagonal.eigenvectors
    monkeypatch.setattr(Tridiagonal, "eigenvectors", poor)
    W = svd_matrices.matrix(64, 64, "gaussian", CPU, 1)
    with pytest.raises(svd_providers.Refused, match="so that full ran"):
        svd_providers.forced("tridiagonal", W, ipca.Window(20, 8))


def test_stacks_are_decomposed_whole_and_their_yardstick_is_multiplied(monkeypatch, tmp_path):
    monkeypatch.setattr(svd_providers, "TOGETHER", 2)
    cell = replace(TINY, batch=3, windows=("middle",), op="llama-2-7b")
    ours, base = run([cell], tmp_path / "window_svd_cpu.csv")
    assert (ours["provider"], ours["scaled_by"], ours["status"]) == (OURS, "1", "ok")
    assert (base["provider"], base["scaled_by"], base["matrices"]) == (YARDSTICK, "3", "3 × 96 × 64")
    whole = svd_providers.provider(YARDSTICK, torch.zeros(3, 4, 4), ipca.Window(0, 1))
    lane = svd_race.Lane(whole, None, 0.0, None, times=[0.5, 0.25])
    assert lane.timing().rounds == (1.5, 0.75)


def test_a_ratio_is_that_of_rounds_which_both_ran():
    entrant = svd_providers.Provider(None, None)
    base = svd_race.Lane(entrant, None, 0.0, None, times=[1.0, 1.0, 10.0, 20.0])
    own = svd_race.Lane(entrant, None, 0.0, None, times=[0.5, 0.25, 5.0])
    columns = svd_race.times(own, base)
    assert (columns["ratio"], columns["ratio_best"], columns["rounds"]) == ("0.5000", "0.2500", 3)
    assert "ratio" not in svd_race.times(own, None)


@pytest.mark.parametrize(("m", "n"), [(50, 30), (30, 50)])
@pytest.mark.parametrize("spectrum", ["gaussian", "outliers", "heavy"])
def test_accuracy_sees_angles_shifts_and_exchanges(m, n, spectrum):
    W = svd_matrices.matrix(m, n, spectrum, CPU, 1)[0]
    exact = svd_matrices.truth(m, n, spectrum, CPU, 1)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)

    def found(indices):
        return svd_matrices.Found(U[:, indices], S[indices], Vh[indices].mT)

    right = svd_matrices.accuracy(W, found([10, 11, 12]), exact, 10)
    assert (right.index_errors, right.residual < 1e-14, right.angle < 1e-7) == (0, True, True)
    exchanged = svd_matrices.accuracy(W, found([11, 10, 12]), exact, 10)
    assert (exchanged.index_errors, exchanged.angle < 1e-7) == (2, True)
    shifted = svd_matrices.accuracy(W, found([11, 12, 13]), exact, 10)
    assert (shifted.index_errors, shifted.angle) == (3, pytest.approx(torch.pi / 2))
    tilted = found([10, 11, 12])
    side, other = (tilted.V, Vh[20]) if m >= n else (tilted.U, U[:, 20])
    side[:, 0] = 0.8 * side[:, 0] + 0.6 * other
    assert svd_matrices.accuracy(W, tilted, exact, 10).angle == pytest.approx(0.6435, abs=1e-4)
    doubled = replace(found([10]), S=2 * S[10:11])
    assert svd_matrices.accuracy(W, doubled, exact, 10).residual == pytest.approx(float(S[10] / S[0]), rel=1e-6)


def test_the_truth_of_a_gpu_is_that_of_a_cpu(monkeypatch):
    exact = svd_matrices.truth.__wrapped__(50, 30, "outliers", CPU, 1)
    W = svd_matrices.matrix(50, 30, "outliers", CPU, 1)
    monkeypatch.setattr(svd_matrices, "matrix", lambda *arguments: W)
    same = svd_matrices.truth.__wrapped__(50, 30, "outliers", torch.device("cuda"), 1)
    assert same.largest == pytest.approx(exact.largest)
    assert torch.allclose((same.vectors.mT @ exact.vectors).abs(), torch.eye(30, dtype=torch.float64), atol=1e-6)


def test_components_of_factors_and_of_one_factor():
    torch.manual_seed(0)
    W = torch.randn(20, 12, dtype=torch.float64)
    U, S, Vh = (part[..., :4] if k < 2 else part[:4] for k, part in enumerate(torch.linalg.svd(W, full_matrices=False)))
    A, B = S.sqrt()[:, None] * Vh, U * S.sqrt()
    for found in (svd_initialize.components(W, A, B), svd_initialize.components(W, torch.zeros_like(A), U)):
        assert torch.allclose(found.U * found.S @ found.V.mT, U * S @ Vh)
        assert torch.allclose(found.S, S)


def test_the_grid_has_every_row_once_and_the_claims_first():
    cells = svd_grid.grid("cpu")

    def keys(cell):
        return [
            bench.row_key({**vars(cell), "window": window, "provider": name})
            for window, name in svd_grid.tasks(cell, "cpu")
        ]

    rows = [key for cell in cells for key in keys(cell)]
    assert len(rows) == len(set(rows))
    claims = [key for cell in svd_grid.must_show() for key in keys(cell)]
    assert set(claims) <= {key for cell in cells[:4] for key in keys(cell)}
    found = {(c.m, c.n, c.rank) for c in cells if c.spectrum == "outliers" and c.windows == svd_grid.WINDOWS}
    for d in svd_grid.SIZES:
        shapes = {(m, d, r) for m in (d, 4 * d) for r in (8, 16, 64, d // 4) if r <= d // 2}
        assert found >= {(m, d, r) for m, d, r in shapes if d < 3072 or m == d or r == 64}
    assert {c.rank for c in cells if c.spectrum == "minilm query"} == {8, 16, 64, 96}


def test_a_gpu_decomposes_all_projections_of_the_model():
    cells = svd_grid.grid("cuda")
    assert sum(cell.batch for cell in cells if cell.op == "llama-2-7b") == 224
    assert (cells[0].m, cells[0].batch, cells[0].rank) == (4096, 1, 64)
    for cell in cells:
        names = {name for _, name in svd_grid.tasks(cell, "cuda")}
        assert {OURS, YARDSTICK} <= names
        assert not names & {svd_grid.RANGE, "ipca-tridiagonal", "ipca-gram_eigh", "ipca-full"}
        assert cell.batch == 1 or names == {OURS, YARDSTICK}


@pytest.fixture
def command(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "grid", lambda device: [TINY])
    monkeypatch.setattr(bench, "quick_grid", lambda: [MODEL])
    claim = replace(TINY, windows=("middle",), only=(OURS, YARDSTICK))
    monkeypatch.setattr(bench, "must_show", lambda: [claim, MODEL])

    def call(*options):
        arguments = ["bench_window_svd.py", "--device", "cpu", "--out", str(tmp_path), *options]
        monkeypatch.setattr(sys, "argv", arguments)
        return bench.main(), facts.read_rows(tmp_path / "window_svd_cpu.csv")

    return call


def test_the_claims_alone_are_printed_with_both_ratios(command, capsys):
    code, rows = command("--must-show")
    assert code == 0
    assert len(rows) == 2 + 6
    said = capsys.readouterr().out
    assert "window_svd 96 × 64, middle, r=16, gram_eigh: " in said
    assert "initialize 4 × 64 × 64, 2 × 96 × 64, minor, r=4" in said
    assert said.count("of the best") == 4
    assert said.count("; 0 indices wrong") == 4


def test_the_command_picks_cells_and_says_by_its_status_whether_all_were_right(command, monkeypatch, capsys):
    assert command("--only", "nothing") == (0, [])
    code, rows = command("--only", "96x64", "r=16")
    assert (code, {row["op"] for row in rows}) == (0, {"window_svd"})
    assert "| PEFT pissa |" not in capsys.readouterr().out
    code, rows = command("--quick")
    assert (code, {row["op"] for row in rows}) == (0, {"window_svd", "initialize"})
    assert "| PEFT mica | minor |" in capsys.readouterr().out
    rows[0]["status"] = "wrong: off"
    monkeypatch.setattr(bench, "read_rows", lambda path: rows)
    assert command()[0] == 1
    assert "wrong: off" in capsys.readouterr().err


def window_rows(times, *, d=2048, window="middle", rank=64, path="interior", device="cpu x86_64, 2 threads", **columns):
    """A window's rows from seconds by provider; torch.linalg.svd takes 1."""
    shared = {"op": "window_svd", "m": d, "n": d, "batch": 1, "matrices": f"{d} × {d}", "dtype": "float32"}
    shared |= {"spectrum": "outliers", "rank": rank, "window": window, "start": (d - rank) // 2, "status": "ok"}
    shared |= {"yardstick": YARDSTICK, "angle": 1e-5, "index_errors": 0, "certified": 1, "device": device}
    shared |= {"commit": "new", "torch": "2.13.0", "peft": "0.21.2", "python": "3.11"}
    rows = []
    for name, seconds in {YARDSTICK: 1.0, **times}.items():
        own = {"path": path if name == OURS else name.removeprefix("ipca-"), "provider": name}
        rows.append({**shared, **own, "median_s": seconds, "best_s": seconds, "ratio": seconds, **columns})
    return rows


def written(folder, rows, name="window_svd_cpu.csv"):
    facts.append_rows(folder / name, rows, bench.COLUMNS)
    return facts.read_rows(folder / name)


def test_the_page_says_ratios_to_the_svd_and_to_the_best_rival(tmp_path, tiny):
    rows = window_rows({OURS: 0.4, svd_grid.EIGH: 1.2, svd_grid.RANGE: 0.5, "ipca-interior": 0.1})
    rows += window_rows({OURS: 0.6, svd_grid.EIGH: 1.2}, window="minor", path="bottom")
    rows += window_rows({OURS: 0.9, svd_grid.EIGH: 0.6}, d=64, rank=16, path="gram_eigh")
    rows += window_rows({OURS: 0.3, svd_grid.RANDOMIZED: 0.1, svd_grid.PROPACK: ""}, window="principal", rank=16)
    rows += [row for row in tiny if row["op"] == "initialize"]
    written(tmp_path, [{**row, "commit": "new"} for row in rows])
    text = report.window_svd_section(tmp_path)
    assert text.startswith(report.NO_GPU)
    assert "| 64 | 1 | gram_eigh | – | 0.90 | – | 0.90 | – | 1.50 | – | 1.50 |" in text  # r = 16 is d / 4 too
    assert "| 2048 | 1 | interior, bottom | – | 0.30 | 0.40–0.60 | – | – | 0.30 | 0.60–0.80 | – |" in text
    assert "| 2048 × 2048 | outliers | 16 | 0.3 | 1e-05 | 0.33×, 1e-05 | – | – | – |" in text
    assert "gets its adapter:" in text
    assert "| PEFT pissa | principal |" in text
    assert "![time over that of torch.linalg.svd](../../bench/results/window_svd_cpu.png)" in text


def test_rows_that_no_table_would_show_are_refused(tmp_path):
    written(tmp_path, window_rows({OURS: 0.4}) + window_rows({OURS: 0.4}, op="another"))
    with pytest.raises(ValueError, match=r"window_svd_cpu\.csv has rows of another, which no table would show"):
        report.window_svd_section(tmp_path)


def test_without_a_file_the_readme_says_so(tmp_path):
    assert report.window_svd_section(tmp_path) == "Not measured yet."


def test_what_speaks_against_us_is_named(tmp_path):
    rows = window_rows({OURS: 1.5, "ipca-tridiagonal": 1.2}) + window_rows(
        {OURS: 1.01, "ipca-top": 1.0}, window="minor"
    )
    rows += window_rows({OURS: 1.2, svd_grid.RANGE: 0.5}, d=1024, certified=0)
    rows += window_rows({"ipca-top": ""}, window="principal", status="wrong: off")[1:]
    lines = svd_tables.against(written(tmp_path, rows), most=1)
    assert lines == [
        "window_svd is slower than torch.linalg.svd by over 10 % in 2 of 3 windows: "
        "2048 × 2048 outliers middle r=64 (1.50), …",
        "window_svd is slower than the fastest exact rival by over 50 % in 1 of 3 windows: "
        "1024 × 1024 outliers middle r=64 (2.40)",
        "window_svd is on a path that is slower than another by over 10 % in 1 of 2 windows: "
        "2048 × 2048 outliers middle r=64: interior, not tridiagonal (1.25)",
        "indices not proven: 1024 × 1024 outliers middle r=64",
        "ipca-top at 2048 × 2048 outliers principal r=64: wrong: off",
    ]


def test_the_picture_has_a_panel_for_each_rank(tmp_path):
    rows = [row for rank in (16, 64) for d in (256, 2048) for row in window_rows({OURS: 0.4}, d=d, rank=rank)]
    rows += [row | {"m": 4 * 256} for row in window_rows({OURS: 0.4}, d=256)]
    plots.draw_windows(written(tmp_path, rows), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    plots.draw_windows([], tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()
