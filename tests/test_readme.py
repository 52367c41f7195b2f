"""README: its programs run as printed, its commands exist, its figures are those of the files it names."""

import csv
import re
import shlex
from pathlib import Path
from statistics import median

import pytest

from ipca.cli.arguments import parser
from tests.helpers.markdown import blocks, sections

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = {title: found for title, body in sections(TEXT).items() if (found := blocks(body, "python"))}
COMMANDS = [line for block in blocks(TEXT, "sh") for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("title", PROGRAMS)
def test_a_program_runs_as_printed_on_a_tiny_model(title, tmp_path, monkeypatch):
    for needed in ("transformers", "peft"):
        pytest.importorskip(needed)
    from transformers import LlamaForCausalLM

    from tests.helpers.model_folders import llama_config

    LlamaForCausalLM(llama_config()).save_pretrained(tmp_path / "path" / "to" / "model")
    monkeypatch.chdir(tmp_path)
    names = {}
    for program in PROGRAMS[title]:
        exec(compile(program, f"README.md, {title}", "exec"), names)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_programs_are_those_that_the_page_promises():
    assert set(PROGRAMS) == {"Use it in PEFT", "Use it in plain PyTorch"}
    assert "PCConfig(" in PROGRAMS["Use it in PEFT"][0]
    assert "apply_pc(" in PROGRAMS["Use it in plain PyTorch"][0]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_exists(line):
    command, *words = shlex.split(line, comments=True)
    if command == "make":
        assert set(words) <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    elif command == "pip":
        assert words[0] == "install"
        assert [word for word in words[1:] if not re.fullmatch(r"\.(\[[\w,]+\])?", word)] == []
    else:
        assert command == "ipca"
        parser().parse_args(words)


def test_every_extra_is_named():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = re.search(r"^\[project\.optional-dependencies\]\n(.*?)^\[", text, flags=re.DOTALL | re.MULTILINE)[1]
    extras = set(re.findall(r"^(\w+) = ", table, flags=re.MULTILINE))
    install = sections(TEXT)["Install"]
    assert set(re.findall(r"\[(\w+)\]", install)) == extras - {"study", "docs"}  # for a checkout only


def test_the_page_is_short_and_begins_with_the_command_and_its_picture():
    lines = TEXT.splitlines()
    assert len(lines) <= 120
    first_screen = "\n".join(lines[:32])
    assert "ipca train path/to/model" in first_screen
    assert "german_curve.png" in first_screen
    assert "PCConfig(" in first_screen
    assert "principal components (PC)" in lines[2]


def rows(path, **wanted):
    with (ROOT / path).open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if all(row[key] == value for key, value in wanted.items())]


def test_what_the_study_found_is_in_its_file():
    found = rows("studies/window_position/results/claims.csv", claim="equal target", against="lora")
    by_place = {row["place"]: row for row in found}
    shown = [
        "{:+.3f} [{:+.3f}, {:+.3f}]".format(*(float(by_place[place][end]) for end in ("mean", "low", "high")))
        for place in ("M1", "V1")
    ]
    minilm, vit = (each.replace("-", "−") for each in shown)
    text = f"| no difference shown: {vit} (ViT), {minilm} (MiniLM) |"
    assert text in TEXT
    assert {by_place[place]["n"] for place in ("M1", "V1")} == {"10"}
    assert {row["verdict"] for row in found} <= {"not shown", "edge"}
    tests = {row["claim"]: row for row in rows("studies/window_position/results/tests.csv")}
    vit, minilm = (
        "{:+.3f} [{:+.3f}, {:+.3f}]".format(*(float(tests[name][end]) for end in ("mean", "low", "high")))
        for name in ("C11", "C6")
    )
    said = f"| a small ViT: {vit}; MiniLM, feed-forward layers: {minilm}, but at one rate no difference is shown |"
    assert said.replace("-", "−").replace("feed−forward", "feed-forward") in TEXT
    assert {name: tests[name]["verdict"] for name in ("C6", "C11", "S6")} == {
        "C6": "below",
        "C11": "below",
        "S6": "not shown",
    }
    same = rows("studies/window_position/results/claims.csv", claim="same rate", against="1.0")
    assert {row["place"]: row["verdict"] for row in same}.items() >= {"M1": "holds", "V1": "reversed"}.items()


def test_the_times_of_the_window_svd_are_those_of_its_file():
    def ratio(size, rank):
        wanted = {"op": "window_svd", "matrices": f"{size} × {size}", "window": "middle", "rank": str(rank)}
        wanted["spectrum"] = "outliers"
        (row,) = rows("bench/results/window_svd_cpu.csv", provider="ipca", status="ok", **wanted)
        return float(row["ratio"])

    assert f"| {1 / ratio(4096, 64):.1f} (4096 × 4096), {1 / ratio(2048, 64):.1f} (2048 × 2048) |" in TEXT
    assert f"takes {ratio(64, 16):.1f} times as long as `torch.linalg.svd`, of a 384 × 384 {ratio(384, 16):.2f}" in TEXT


def test_the_times_of_the_layer_are_those_of_its_file():
    cell = {"mode": "full", "compiled": "0", "M": "512", "N": "1024", "K": "1024", "rank": "16", "dropout": "0.0"}

    def ratio(provider, form):
        (row,) = rows("bench/results/pc_linear_cpu.csv", provider=provider, form=form, status="ok", **cell)
        return f"{float(row['ratio_linear']):.2f}"

    ours = f"intact {ratio('ipca-auto', 'intact')}, residual {ratio('ipca-auto', 'residual')}"
    assert f"| {ours}, PEFT's LoRA {ratio('peft-default', '')} |" in TEXT


def test_the_times_beside_peft_are_those_of_its_file():
    found = rows(
        "bench/results/versus_peft_cpu.csv", provider="PEFT with PCConfig", mode="full", rank="16", status="ok"
    )
    ratios = {
        threads: [float(row["ratio_peft_default"]) for row in found if f"{threads} threads" in row["device"]]
        for threads in (1, 2)
    }
    both = ratios[1] + ratios[2]
    assert {len(of) for of in ratios.values()} == {24}
    slower = [sum(ratio > 1.02 for ratio in of) for of in ratios.values()]
    said = f"median {median(both):.2f}, at worst {max(both):.2f}; slower by over 2 % in {slower[0]} (one thread)"
    what = "small layers in training, 24 cells of rank 16, `PCConfig`: time over PEFT's LoRA"
    assert f"| {what} | {said} and {slower[1]} (two)" in TEXT
