import re
import shutil
import sys

from bench import report
from bench import result_tables as tables
from bench import rows as bench_rows
from bench.pc_linear import COLUMNS
from bench.training import COLUMNS as TRAINING_COLUMNS

OURS = [("ipca-auto", form) for form in ("residual", "intact")]


def layer_rows(times, *, M=8192, device="NVIDIA H100 80GB HBM3", commit="new", **columns):
    """A full step of one cell from milliseconds by ``(provider, form)``; nn.Linear takes 1."""
    times = {("linear", ""): 1.0, ("peft-default", ""): 2.0, ("peft-bf16", ""): 1.5, **times}
    shared = {"op": "pc_linear", "mode": "full", "M": M, "N": 4096, "K": 4096, "rank": 16, "dtype": "bfloat16"}
    shared |= {"dropout": 0.0, "compiled": 0, "status": "ok", "peak_mib": 100.0, "device": device, "commit": commit}
    shared |= {"torch": "2.11.0", "triton": "3.6.0", "peft": "0.21.2", "python": "3.12", "backend": "triton"}
    rows = []
    for (provider, form), ms in times.items():
        ratios = {"ratio_linear": ms, "ratio_peft_default": ms / times["peft-default", ""]}
        ratios["ratio_peft_bf16"] = ms / times["peft-bf16", ""]
        rows.append({**shared, "provider": provider, "form": form, "median_ms": ms, **ratios, **columns})
    return rows


def written(folder, rows, name="pc_linear_h100.csv", columns=COLUMNS):
    bench_rows.append_rows(folder / name, rows, columns)
    return bench_rows.read_rows(folder / name)


def training_rows(provider, form, losses, seconds, status="ok", device="NVIDIA H100 80GB HBM3"):
    shared = {"provider": provider, "form": form, "status": status, "seconds": seconds, "peak_mib": "4000"}
    shared |= {"tokens_per_s": 8192 / seconds, "parameters": 1100048384, "layers": 22, "hidden": 2048, "rank": 16}
    shared |= {"batch": 4, "length": 2048, "dtype": "bfloat16", "device": device, "torch": "2.11.0", "triton": "3.6.0"}
    shared |= {"peft": "0.21.2", "python": "3.12", "commit": "new"}
    return [{**shared, "step": k, "loss": loss, "loss_difference": 1e-3 * k} for k, loss in enumerate(losses)]


def test_the_table_says_ratio_speedup_and_memory(tmp_path):
    written(tmp_path, layer_rows({OURS[0]: 1.1, OURS[1]: 1.25}))
    text = report.pc_linear_section(tmp_path)
    assert "| 8192 | 4096 × 4096 | 16 | 0.0 | 1.000 | 1.10 | 1.25 | 1.36× | – | 1.82× | 100.0 / 100.0 |" in text
    assert "**NVIDIA H100 80GB HBM3**, bfloat16; torch 2.11.0, triton 3.6.0, PEFT 0.21.2, Python 3.12." in text
    assert "![time over that of a bare nn.Linear](../../bench/results/pc_linear_h100.png)" in text
    assert report.NO_GPU not in text
    assert text.startswith(tables.LEGEND)


def test_without_a_gpu_file_the_section_says_so_first(tmp_path):
    assert report.pc_linear_section(tmp_path) == report.training_section(tmp_path) == report.NO_GPU
    written(tmp_path, layer_rows({OURS[0]: 1.1}, device="cpu x86_64, 2 threads"), "pc_linear_cpu.csv")
    text = report.pc_linear_section(tmp_path)
    assert text.startswith(report.NO_GPU)
    assert "**cpu x86_64, 2 threads**" in text
    written(tmp_path, layer_rows({OURS[0]: 1.1}))
    text = report.pc_linear_section(tmp_path)
    assert report.NO_GPU not in text
    assert text.index("H100") < text.index("cpu x86_64")
    assert text.count(tables.LEGEND) == 1


def test_what_speaks_against_us_is_named(tmp_path):
    rows = layer_rows({OURS[0]: 1.1, ("ipca-addmm", "residual"): 1.0, OURS[1]: 1.3})
    rows += layer_rows({OURS[0]: 1.8, OURS[1]: 1.51}, M=256)
    lines = tables.against(written(tmp_path, rows))
    slower = "auto, residual form, is slower than PEFT's fastest arm by over 2 %"
    assert lines[0] == f"{slower} in 1 of 2 cells: M=256 4096×4096 r=16 (1.20)"
    assert lines[1].endswith("in 1 of 2 cells: M=8192 4096×4096 r=16 (1.10)")
    assert lines[2].endswith("by over 2 % in 0 of 2 cells")  # 1.51 against 1.5 is a tie
    assert lines[3].endswith("in 0 of 2 cells")


def test_the_worst_cells_are_named_first_and_the_rest_counted(tmp_path):
    rows = [row for k in range(5) for row in layer_rows({OURS[0]: 1.6 + 0.1 * k}, M=256 * (k + 1))]
    line = tables.against(written(tmp_path, rows), most=2)[0]
    assert line.endswith("in 5 of 5 cells: M=1280 4096×4096 r=16 (1.33), M=1024 4096×4096 r=16 (1.27), …")


def test_wrong_and_failed_rows_are_shown(tmp_path):
    rows = layer_rows({OURS[0]: 1.1})
    rows[-1] |= {"status": "wrong: dA is off by 1.0e-01, allowed 1.0e-03", "median_ms": "", "ratio_linear": ""}
    rows += layer_rows({OURS[1]: 1.2}, M=256)
    text = report.pc_linear_section(tmp_path) if written(tmp_path, rows) else ""
    assert "ipca-auto residual at M=8192 4096×4096 r=16, full: wrong: dA is off by 1.0e-01" in text
    assert "| 8192 | 4096 × 4096 | 16 | 0.0 | 1.000 | – | – | – | – | – | – / 100.0 |" in text


def test_only_the_last_commit_counts(tmp_path):
    rows = layer_rows({OURS[0]: 1.9}, commit="old") + layer_rows({OURS[0]: 1.1})
    text = report.pc_linear_section(tmp_path) if written(tmp_path, rows) else ""
    assert "1.90" not in text
    assert "| 1.10 |" in text


def test_compiled_rows_have_a_line_of_their_own(tmp_path):
    rows = layer_rows({OURS[0]: 1.1}) + layer_rows({OURS[0]: 1.05}, compiled=1)
    written(tmp_path, rows)
    text = report.pc_linear_section(tmp_path)
    over = "time over that of nn.Linear without torch.compile"
    assert f"- under torch.compile at M=8192 4096×4096 r=16, {over}: linear 1.00," in text
    assert "ipca-auto residual 1.05" in text
    assert text.count("| 8192 |") == 1


def test_the_goal_in_one_line(tmp_path):
    rows = written(tmp_path, layer_rows({OURS[0]: 1.1, OURS[1]: 1.2}))
    assert tables.goal_line(rows) == (
        "goal, M=8192 4096×4096 r=16, forward + backward: residual 1.10 of nn.Linear (triton), intact 1.20; "
        "faster than PEFT: 1.36× bf16, 1.82× default; peak 100.0 MiB"
    )
    assert tables.goal_line([]) == "goal: not measured"


def test_the_table_against_peft_counts_what_is_slower_and_what_is_wrong():
    def row(provider, form, threads, ratio, status="ok", M="64"):
        cell = {"mode": "full", "M": M, "N": "256", "K": "1024", "rank": "8", "device": f"cpu x, {threads} threads"}
        return {**cell, "provider": provider, "form": form, "ratio_peft_default": ratio, "status": status}

    rows = [row("linear", "", 1, "0.5"), row("peft-default", "", 1, "1.0")]
    rows += [row("ipca-auto", "intact", 1, "1.02"), row("ipca-auto", "intact", 1, "1.03", M="128")]
    rows += [row("ipca-auto", "intact", 2, "0.90"), row("PEFT with PCConfig", "intact", 2, "", "wrong: dA")]
    table = tables.versus_peft_table(rows).splitlines()
    assert table[0].startswith("| | rank | layer | 1 thread: slower by > 2 % | 2 threads: slower by > 2 % |")
    assert table[2:] == [
        "| training | 8 | LinearPC, intact | 1 of 2 | 0 of 1 | 1.02 | 1.03, 1024 → 256, M = 128, threads = 1 |",
        "| training | 8 | PCConfig | 0 of 0 | 1 of 1 | inf | inf, 1024 → 256, M = 64, threads = 2 |",
    ]


def test_the_training_table(tmp_path):
    rows = training_rows("peft-default", "", [10.0, 8.0, 7.0], 0.5)
    rows += training_rows("ipca-auto", "residual", [10.0, 8.0, 7.007], 0.25)
    rows += training_rows("peft-bf16", "", [10.0, 8.5, 9.0], 0.4, status="wrong")
    written(tmp_path, rows, "training_h100.csv", TRAINING_COLUMNS)
    text = report.training_section(tmp_path)
    assert "| ipca-auto residual | 32768 | 2.00× | 4000 | 10.000 → 7.007 | 2.0e-03 |" in text
    assert "| peft-bf16 | 20480 | 1.25× | 4000 | 10.000 → 9.000 | 2.0e-03 **wrong** |" in text
    assert "1100 M parameters, 22 layers of 2048; rank 16, 4 × 2048 tokens a step" in text


def test_the_picture_is_drawn_from_the_rows(tmp_path):
    rows = [row for M in (256, 8192) for row in layer_rows({OURS[0]: 1.1}, M=M)]
    report.draw(written(tmp_path, rows), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    refused = [{**row, "status": "refused: no"} for row in bench_rows.read_rows(tmp_path / "pc_linear_h100.csv")]
    report.draw(refused, tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


def test_the_command_writes_the_pages_and_checks_them(monkeypatch, tmp_path, capsys):
    results, pages = tmp_path / "bench" / "results", tmp_path / "docs" / "results"
    results.mkdir(parents=True)
    names = (
        "german_curve",
        "german_tradeoff",
        "apply_memory",
        "adapter_load",
        "quantized_start",
        "small_models_cpu",
        "versus_peft_cpu",
        "init_checkpoint",
        "start_cpu",
        "baseline_checks",
    )
    for name in (*(f"{name}.csv" for name in names), "change_error.csv"):
        shutil.copy(report.RESULTS / name, results)
    written(results, layer_rows({OURS[0]: 1.1}))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", results)

    def command(*options):
        monkeypatch.setattr(sys, "argv", ["report.py", *options])
        return report.main()

    assert command("--check") == 1
    assert "benchmarks.md, fine-tuning.md, baselines.md out of date; run: make report" in capsys.readouterr().err
    assert not pages.exists()
    assert not (results / "pc_linear_h100.png").exists()
    assert command() == 0
    assert command("--check") == 0
    assert (results / "pc_linear_h100.png").exists()
    assert "| 1.10 |" in (pages / "benchmarks.md").read_text()
    written(results, layer_rows({OURS[0]: 1.3}, M=256))
    assert command("--check") == 1
    assert "benchmarks.md out of date" in capsys.readouterr().err


def test_the_pages_are_up_to_date_and_their_pictures_exist():
    pages = {"benchmarks": report.benchmarks_page, "fine-tuning": report.fine_tuning_page}
    for name, text in {**pages, "baselines": report.baselines_page}.items():
        page = report.ROOT / "docs" / "results" / f"{name}.md"
        assert page.read_text(encoding="utf-8") == text(report.RESULTS)
        assert all((page.parent / link).exists() for link in re.findall(r"\]\((\.\./[^)]+)\)", page.read_text()))
