import sys
from dataclasses import replace

import pytest
import torch

from bench import rows as bench_rows
from bench import training as bench
from ipca.model.apply import adapted_layers

CPU = torch.device("cpu")
TINY = bench.Settings(32, 48, 1, 2, 1, 64, batch=2, length=16, steps=6, dtype="float32", rank=4, lr=1e-2)


def losses(rows, provider, form=""):
    return [float(row["loss"]) for row in rows if (row["provider"], row["form"]) == (provider, form)]


def test_every_provider_has_a_row_of_the_schema_for_each_step(tmp_path):
    rows = bench.run_training(TINY, tmp_path / "training.csv", CPU, seconds=60)
    assert [int(row["step"]) for row in rows] == [step for step in range(6) for _ in range(4)]
    assert {(row["provider"], row["form"]) for row in rows} == {
        ("peft-default", ""),
        ("ipca-auto", "residual"),
        ("ipca-auto", "intact"),
        ("PEFT with PCConfig", "intact"),
    }
    for row in rows:
        assert tuple(row) == bench.COLUMNS
        assert float(row["tokens_per_s"]) == pytest.approx(32 / float(row["seconds"]), rel=1e-2)
        assert row["torch"] == torch.__version__


def test_losses_agree_step_by_step_and_fall(tmp_path):
    rows = bench.run_training(TINY, tmp_path / "training.csv", CPU, seconds=60)
    theirs = losses(rows, "peft-default")
    for ours in (("ipca-auto", "residual"), ("ipca-auto", "intact"), ("PEFT with PCConfig", "intact")):
        assert losses(rows, *ours) == pytest.approx(theirs, rel=1e-4)
    assert theirs[4] < 0.98 * theirs[0]  # the first batch comes again
    assert {row["status"] for row in rows} == {"ok"}
    assert max(float(row["loss_difference"]) for row in rows) <= 1e-4


def test_all_train_the_same_factors_of_the_same_layers():
    runs = [bench.build(provider, TINY, CPU) for provider in bench.providers_of(TINY)]
    for run in runs:
        trained = [p for p in run.model.parameters() if p.requires_grad]
        assert len(trained) == 2 * len(bench.TARGETS)
        assert {id(p) for group in run.optimizer.param_groups for p in group["params"]} == set(map(id, trained))
    shapes = [[p.shape for p in run.model.parameters() if p.requires_grad] for run in runs]
    assert all(of_one == shapes[0] for of_one in shapes)
    assert all(name.endswith(bench.TARGETS) for name in adapted_layers(runs[1].model))


@pytest.mark.parametrize("planted", ["no branch", "frozen A"])
def test_another_function_or_gradient_is_wrong(monkeypatch, tmp_path, planted):
    build = bench.build

    def changed(provider, settings, device):
        run = build(provider, settings, device)
        for layer in adapted_layers(run.model).values():
            if provider.form == "residual" and planted == "no branch":
                torch.nn.init.zeros_(layer.lora_B)
            elif provider.form == "residual":
                layer.lora_A.requires_grad_(False)
        return run

    monkeypatch.setattr(bench, "build", changed)
    rows = bench.run_training(TINY, tmp_path / "training.csv", CPU, seconds=60)
    status = {(row["provider"], row["form"]): row["status"] for row in rows}
    assert [name for name, state in status.items() if state != "ok"] == [("ipca-auto", "residual")]
    assert status["ipca-auto", "residual"] == "wrong"
    assert len(status) == 4


def test_a_loss_that_is_no_number_is_wrong():
    runs = [
        bench.Run(provider, None, None, None, losses=[loss])
        for provider, loss in zip(bench.providers_of(TINY), (1.0, float("nan"), 1.00001, 1.0), strict=True)
    ]
    assert [bench.row_of(run, runs[0], 0, 1.0, TINY)["status"] for run in runs] == ["ok", "wrong", "ok", "ok"]


def test_sixteen_bits_have_three_arms_of_peft(tmp_path):
    settings = replace(TINY, dtype="bfloat16", lr=1e-3, steps=2)
    rows = bench.run_training(settings, tmp_path / "training.csv", CPU, seconds=60)
    arms = [row["provider"] for row in rows if row["step"] == "0" and not row["form"]]
    assert arms == ["peft-default", "peft-autocast", "peft-bf16"]
    assert {row["status"] for row in rows} == {"ok"}


def test_a_whole_run_is_not_repeated_and_a_part_is(monkeypatch, tmp_path):
    path = tmp_path / "training.csv"
    short = replace(TINY, steps=2)
    rows = bench.run_training(short, path, CPU, seconds=60)
    calls = []
    build = bench.build
    monkeypatch.setattr(bench, "build", lambda *arguments: calls.append(1) or build(*arguments))
    assert bench.run_training(short, path, CPU, seconds=60) == rows
    assert not calls
    again = bench.run_training(replace(TINY, steps=3), path, CPU, seconds=60)
    assert len(again) == len(bench_rows.read_rows(path)) == 12
    assert losses(again, "peft-default")[:2] == losses(rows, "peft-default")


def test_the_deadline_stops_between_steps(monkeypatch, tmp_path):
    clock = iter(range(100))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))  # begun at 0; a step of four runs takes 9
    rows = bench.run_training(TINY, tmp_path / "training.csv", CPU, seconds=11)
    assert [row["step"] for row in rows] == ["0"] * 4 + ["1"] * 4
    assert bench.run_training(TINY, tmp_path / "none.csv", CPU, seconds=-1) == []


@pytest.mark.parametrize("wrong", [False, True])
def test_the_command_says_by_its_status_whether_all_were_right(monkeypatch, tmp_path, capsys, wrong):
    monkeypatch.setattr(bench, "SMALL", replace(TINY, steps=2))
    monkeypatch.setitem(bench.TOLERANCE, "float32", -1.0 if wrong else 1e-4)
    monkeypatch.setattr(sys, "argv", ["training.py", "--out", str(tmp_path), "--device", "cpu"])
    assert bench.main() == int(wrong)
    assert "| ipca-auto residual |" in capsys.readouterr().out
    assert (tmp_path / "training_cpu.csv").exists()
