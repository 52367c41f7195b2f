"""``ipca train`` and ``ipca tradeoff``: what they print, their exit status, and their options."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ipca.cli.arguments import parse_arguments
from ipca.cli.main import main
from tests.helpers.train_runs import KEPT, TEXT, save_language_model

pytest.importorskip("trl")
pytest.importorskip("datasets")

from ipca.train.outcome import read_curve

ROOT = Path(__file__).resolve().parents[2]
FEW = ["--rank", "4", "--lr", "5e-3", "--batch", "4", "--evaluations", "4", "--steps", "8"]
SIZES = ["--max-length", "64", "--keep-tokens", "640"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, texts, and a finished run."""
    folder = tmp_path_factory.mktemp("place")
    save_language_model(folder / "model")
    (folder / "new.txt").write_text(TEXT)
    (folder / "keep.txt").write_text(KEPT)
    files = [str(folder / name) for name in ("model", "new.txt")]
    assert (
        main(["train", *files, "--keep", str(folder / "keep.txt"), *FEW, *SIZES, "-o", str(folder / "out"), "--quiet"])
        == 0
    )
    return folder


def trade(place, *more):
    words = [str(place / name) for name in ("model", "out", "new.txt")]
    return main(["tradeoff", *words, "--keep", str(place / "keep.txt"), *SIZES, *more])


def test_a_run_is_summed_up_and_can_be_made_again_from_its_file(place, tmp_path, capsys):
    curve = read_curve(place / "out" / "curve.csv")
    config = ["--config", str(place / "out" / "run.yaml")]
    assert main(["train", *config, "--steps", "2", "-o", str(tmp_path / "two"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in found["curve"]] == [0, 1, 2]
    assert found["curve"][0]["eval_loss"] == curve[0]["eval_loss"]
    assert main(["train", "--resume", "-o", str(place / "out")]) == 0
    said = capsys.readouterr()
    assert f"Kept: step 8. The held-out loss fell from {curve[0]['eval_loss']:.4g} to" in said.out
    assert "holds this run, finished" in said.err


def test_a_log_without_a_terminal_has_a_line_for_each_evaluation(place, tmp_path, capsys):
    config = ["--config", str(place / "out" / "run.yaml")]
    assert main(["train", *config, "--steps", "2", "-o", str(tmp_path / "two")]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ipca: step")]
    assert len(lines) == 3
    assert all("held-out" in line and "keep_kl" in line for line in lines)


@pytest.mark.slow
def test_the_tradeoff_is_shown_gated_and_written(place, tmp_path, capsys):
    assert trade(place, "--scales", "0.5", "1", "--json") == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [point["scale"] for point in points] == [0, 0.5, 1]
    limit = str((points[1]["forgotten"] + points[2]["forgotten"]) / 2)
    out, picture = tmp_path / "mild", tmp_path / "t.png"
    assert trade(place, "--max-kl", limit, "--gate", "-o", str(out), "--plot", str(picture)) == 2
    said = capsys.readouterr().out
    assert "<- best within the budget" in said
    assert picture.stat().st_size > 5_000
    scale = json.loads((out / "adapter_config.json").read_text())["lora_alpha"] / 8
    assert 0.5 < scale < 1
    assert f"scaled by {scale:g}" in (out / "README.md").read_text()
    assert trade(place, "--max-kl", "100", "--gate", "--scales", "1") == 0
    assert trade(place, "--scale", "0.25", "-o", str(tmp_path / "quarter")) == 0
    assert json.loads((tmp_path / "quarter" / "adapter_config.json").read_text())["lora_alpha"] == 2
    assert trade(place, "--scale", "0.25", "-o", str(tmp_path / "quarter")) == 1
    assert "is not empty" in capsys.readouterr().err
    (tmp_path / "quarter" / "notes.txt").write_text("mine")
    inside = tmp_path / "quarter" / "trade.png"
    capsys.readouterr()
    asked = ["--scale", "0.5", "--max-kl", "1e-9", "-o", str(tmp_path / "quarter"), "--force", "--plot", str(inside)]
    assert trade(place, *asked) == 0
    assert "above the budget of 1e-09: the scale of 0.5 was asked for" in capsys.readouterr().out
    assert inside.stat().st_size > 5_000
    assert (tmp_path / "quarter" / "notes.txt").read_text() == "mine"
    assert (
        trade(place, "--max-kl", "1e-12", "-o", str(tmp_path / "none"), "--plot", str(tmp_path / "new" / "t.png")) == 1
    )
    assert "only the base itself is within the budget" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert (tmp_path / "new" / "t.png").stat().st_size > 5_000
    assert trade(place, "--scales", "1", "--plot", str(place / "new.txt" / "x.png")) == 1
    assert "new.txt is not a folder" in capsys.readouterr().err


def test_an_adapter_of_another_model_is_not_traded(place, tmp_path, capsys):
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(place / "model", tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1.1)
    model.save_pretrained(tmp_path / "other")
    words = ["tradeoff", *(str(each) for each in (tmp_path / "other", place / "out", place / "new.txt")), *SIZES]
    words += ["--keep", str(place / "keep.txt"), "--scales", "1"]
    assert main(words) == 1
    assert "was made on another model than" in capsys.readouterr().err
    assert main([*words, "--any-base"]) == 0
    assert main([*words[:1], str(place / "model"), *words[2:], "--dtype", "bfloat16"]) == 0


def test_a_broken_budget_ends_clearly_and_with_status_2_where_it_is_a_gate(place, tmp_path, capsys):
    files = [str(place / name) for name in ("model", "new.txt")]
    words = [
        "train",
        *files,
        "--keep",
        str(place / "keep.txt"),
        *FEW,
        *SIZES,
        "--max-kl",
        "1e-9",
        "--no-rescale",
        "--patience",
        "1",
        "--quiet",
    ]
    assert main([*words, "-o", str(tmp_path / "one")]) == 1
    assert "no checkpoint is within the budget of 1e-09" in capsys.readouterr().err
    assert main([*words, "--gate", "-o", str(tmp_path / "two")]) == 2


WRONG = [
    (["train", "-o", "x"], "give MODEL and DATA, or --config with a file that names them"),
    (["train", "m", "-o", "x"], "give DATA, or --config with a file that names it"),
    (["train", "m", "d", "--gate", "-o", "x"], "--gate needs a budget"),
    (["train", "m", "d", "--max-kl", "1", "--max-drift", "1", "-o", "x"], "not allowed with"),
    (["train", "m", "d", "--columns", "text", "-o", "x"], "takes ROLE=NAME"),
    (["train", "m", "d", "--held-out", "1.5", "-o", "x"], "must be a share between 0 and 1"),
    (["train", "m", "d", "--held-out", "20%", "-o", "x"], "must be a share between 0 and 1"),
    (
        ["train", "m", "d", "--keeep", "k", "-o", "x"],
        "ipca train: error: there is no option --keeep; did you mean --keep?",
    ),
    (["train", "m", "d", "--max_kl=1", "-o", "x"], "no option --max_kl; did you mean --max-kl?"),
    (["train", "m", "d", "--output", "x"], "no option --output; did you mean --out?"),
    (["train", "m", "d", "-o", "x", "-y"], "ipca train: error: unrecognized arguments: -y"),
    (["train", "m", "d", "--window", "midle", "-o", "x"], "midle"),
    (["tradeoff", "m", "a", "d", "--gate"], "--gate needs a budget"),
    (["tradeoff", "m", "a"], "DATA"),
]


@pytest.mark.parametrize(("words", "said"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_wrong_usage_ends_with_status_2(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_an_unknown_setting_and_a_damaged_file(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("model: m\ndata: d\nlearning_rate: 1\nlrr: 1\n")
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "-o", str(tmp_path / "x")]) == 1
    assert "there is no setting 'learning_rate'" in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text("model: [")
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "-o", str(tmp_path / "x")]) == 1
    assert "is not YAML" in capsys.readouterr().err
    assert main(["train", "--resume", "-o", str(tmp_path / "x")]) == 1
    assert "there is no run to go on with" in capsys.readouterr().err


def test_options_of_the_budget_stand_together_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    group = capsys.readouterr().out.partition("\nforgetting:\n")[2].partition("\n\n")[0]
    names = ("--keep", "--keep-tokens", "--max-kl", "--max-drift", "--gate", "--patience", "--no-rescale")
    assert all(f"\n  {name} " in f"\n{group}" for name in names)


def test_columns_are_pairs():
    args = parse_arguments(["train", "m", "d", "--columns", "text=my text", "label=y", "-o", "x"])
    assert args.columns == {"text": "my text", "label": "y"}


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(place, tmp_path):
    words = [str(place / name) for name in ("model", "new.txt")]
    command = ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "ipca", "train", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / command[0]),
            *command[1:],
            "--keep",
            str(place / "keep.txt"),
            *FEW,
            *SIZES,
            "-o",
            str(tmp_path / "out"),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Kept: step 8") == 1
    one, two = (read_curve(folder / "curve.csv") for folder in (place / "out", tmp_path / "out"))
    assert len(one) == len(two) == 5
    for row, other in zip(one, two, strict=True):
        assert other == pytest.approx(row, rel=2e-4)


@pytest.mark.slow
def test_an_adapter_is_scaled_in_its_place_and_beside_the_scales_of_the_curve(place, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(place / "out", out)
    words = [str(place / "model"), str(out), str(place / "new.txt"), "--keep", str(place / "keep.txt"), *SIZES]
    assert main(["tradeoff", *words, "--scales", "1", "--scale", "0.5", "-o", str(out), "--force", "--quiet"]) == 0
    assert json.loads((out / "adapter_config.json").read_text())["lora_alpha"] == 4
    assert main(["tradeoff", *words, "--scales", "0.5", "--max-kl", "100", "--gate", "--quiet"]) == 0


@pytest.mark.parametrize("words", [["train", "m", "d", "-o", "x"], ["tradeoff", "m", "a", "d"]])
def test_a_missing_package_is_named_with_the_extra(words, monkeypatch, capsys):
    monkeypatch.setattr("ipca.cli.train_command.find_spec", lambda name: None if name in ("trl", "datasets") else name)
    assert main(words) == 1
    assert "needs trl, datasets; run: pip install 'ipca-lora[train]'" in capsys.readouterr().err


def test_the_tradeoff_measures_as_the_run_did(place, capsys):
    words = [str(place / name) for name in ("model", "out", "new.txt")]
    keep = ["--keep", str(place / "keep.txt"), "--scales", "1", "--json"]
    assert main(["tradeoff", *words, *keep]) == 0
    said = capsys.readouterr()
    as_run = json.loads(said.out)["points"][-1]
    assert "as in the run of" in said.err
    assert "max_length 64, keep_tokens 640" in said.err
    last = read_curve(place / "out" / "curve.csv")[-1]
    assert as_run["forgotten"] == pytest.approx(last["eval_keep_kl"], rel=1e-4)
    assert main(["tradeoff", *words, *keep, "--max-length", "32", "--keep-tokens", "320"]) == 0
    said = capsys.readouterr()
    assert "max_length" not in said.err
    assert "keep_tokens" not in said.err
    assert json.loads(said.out)["points"][-1]["forgotten"] != as_run["forgotten"]


UNLIKE = "text\n" + "".join("word " * (2 + 5 * (k % 3)) + f"{k}\n" for k in range(12))
TURNS = [{"role": role, "content": text} for role, text in [("user", "a"), ("assistant", "b")] * 2]
ASKED = {
    "a task": ("a.csv", "text,label\n" + "".join(f"word {k},{k % 2}\n" for k in range(12)), ["--task", "causal-lm"]),
    "the tokens": ("a.jsonl", "\n".join([json.dumps({"messages": TURNS})] * 12), ["--loss-on", "all"]),
    "columns": ("a.csv", "text,body\n" + "".join(f"{k},word {k}\n" for k in range(12)), ["--columns", "text=body"]),
    "the passes": ("a.csv", UNLIKE, ["--micro-batch", "2"]),
    "the dtype": ("a.csv", UNLIKE, ["--dtype", "bfloat16"]),
    "the packing": ("a.csv", UNLIKE, ["--packing"]),
}


@pytest.mark.parametrize(("name", "text", "options"), ASKED.values(), ids=ASKED)
def test_the_tradeoff_reads_the_data_as_the_run_did(name, text, options, place, tmp_path, capsys):
    data, out, keep = tmp_path / name, tmp_path / "out", ["--keep", str(place / "keep.txt"), *SIZES]
    data.write_text(text)
    few = ["--rank", "4", "--batch", "4", "--steps", "1", "--evaluations", "1", "--held-out", str(data), "--quiet"]
    assert main(["train", str(place / "model"), str(data), *options, *keep, *few, "-o", str(out)]) == 0
    words = ["tradeoff", str(place / "model"), str(out), str(data), "--keep", str(place / "keep.txt"), "--scales", "1"]
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    said = capsys.readouterr()
    assert f"{options[0][2:].replace('-', '_')} {[*options, 'True'][1]}" in said.err
    last = read_curve(out / "curve.csv")[-1]
    assert json.loads(said.out)["points"][-1]["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)


def test_the_tradeoff_counts_the_tokens_that_it_is_told(place, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(ASKED["the tokens"][1])
    words = ["tradeoff", *(str(each) for each in (place / "model", place / "out", tmp_path / "a.jsonl")), *SIZES]
    assert main([*words, "--scales", "1"]) == 1
    assert "pass --loss-on all" in capsys.readouterr().err
    assert main([*words, "--scales", "1", "--loss-on", "all"]) == 0
    (tmp_path / "b.txt").write_text(TEXT)
    shutil.copytree(place / "out", tmp_path / "out")
    run = tmp_path / "out" / "run.yaml"
    run.write_text(run.read_text().replace("columns: {}", "columns: {text: body}"))
    assert main([*words[:2], str(tmp_path / "out"), str(tmp_path / "b.txt"), *SIZES, "--scales", "1"]) == 0
