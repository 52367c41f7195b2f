"""Runs of a study: arms, scales, measurements, and runners that are killed or meet."""

import copy
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ipca.analysis import cross_entropy_rise, kl_to_base
from studies.frontier import training
from studies.frontier.arms import Tuned
from studies.frontier.design import Run, Wave
from studies.frontier.measure import Reference
from studies.frontier.rows import Rows
from studies.frontier.run import Part, Runners, again, check, collect, grids, how_far, main
from studies.language.protocol import ARMS, MAIN, PROTOCOL, waves
from tests.helpers import frontier_study
from tests.helpers.frontier_study import DESIGN, LENGTH, VOCABULARY, study

RUN = Run("german", 8, "middle", 1e-3, 0)
SCRIPT = Path(frontier_study.__file__)
ROOT = SCRIPT.parents[2]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Everything the small design asks for, made in one go."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    frontier_study.main(folder)
    return folder


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The first runs of the small design."""
    folder = tmp_path_factory.mktemp("begun")
    frontier_study.main(folder, limit=3)
    return folder


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


EXTENDED = PROTOCOL.extended().arms


@pytest.mark.parametrize("arm", [arm for arm in EXTENDED if arm not in ("oft", "osf")])  # test_scaled.py has them
def test_scale_0_is_the_base_and_1_the_tuned_model(arm, tmp_path):
    found = study(tmp_path)
    ids = found.tasks["german"].new
    inputs = found.inputs("german", EXTENDED[arm].inputs) if EXTENDED[arm].inputs else None
    tuned = Tuned(copy.deepcopy(found.base), EXTENDED[arm], 4, 0, found.spectra, inputs)
    before = logits(found.base, ids)
    assert torch.equal(logits(tuned.model, ids), before), "the start is the base"
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.trained.values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    after = logits(tuned.model, ids)
    assert not torch.allclose(after, before, atol=1e-3)
    with tuned.scaled(0.0) as model:
        assert torch.equal(logits(model, ids), before)
    with tuned.scaled(1.0) as model:
        assert torch.equal(logits(model, ids), after)
    with tuned.scaled(0.5) as model:
        weights = {name: layer.weight.detach().clone() for name, layer in linear_layers(model)}
    base, final = dict(linear_layers(found.base)), dict(linear_layers(tuned.model))
    for name, half in weights.items():
        middle = (base[name].weight + final[name].weight.detach()) / 2
        assert torch.allclose(half, middle, atol=1e-6), name
    assert torch.equal(logits(tuned.model, ids), after), "the scale is put back"


def linear_layers(model):
    ends = ("_proj",)
    return [(name, module) for name, module in model.named_modules() if name.endswith(ends)]


def test_arms_train_what_they_say(tmp_path):
    found = study(tmp_path)

    def of(arm):
        return Tuned(copy.deepcopy(found.base), ARMS[arm], 4, 0, found.spectra)

    assert {name.rpartition(".")[2] for name in of("frozen-A").trained} == {"lora_B"}
    assert {name.rpartition(".")[2] for name in of("frozen-B").trained} == {"lora_A"}
    assert {name.rpartition(".")[2] for name in of("full").trained} == {"weight"}
    layer = "model.layers.0.mlp.up_proj"
    middle, principal = (of(arm).model.get_submodule(layer) for arm in ("middle", "principal"))
    reverse = of("middle-at-principal").model.get_submodule(layer)
    cosine = F.cosine_similarity(reverse.lora_A, middle.lora_A, dim=-1).abs()
    assert torch.allclose(cosine, torch.ones(4), atol=1e-4), "the middle's directions"
    assert torch.allclose(reverse.lora_A.norm(dim=-1), principal.lora_A.norm(dim=-1), rtol=1e-4), "principal's size"
    assert of("rslora").model.get_submodule(layer).scaling == 4.0


def test_the_pull_moves_toward_the_start(tmp_path):
    found = study(tmp_path)
    tuned = Tuned(copy.deepcopy(found.base), replace(ARMS["lora"], pull=10.0), 4, 0, found.spectra)
    start = {name: parameter.detach().clone() for name, parameter in tuned.trained.items()}
    with torch.no_grad():
        for parameter in tuned.trained.values():
            parameter += 1
    tuned.pull(0.01)
    for name, parameter in tuned.trained.items():
        assert torch.allclose(parameter - start[name], torch.tensor(0.9), atol=1e-6)


def test_measurements_are_cross_entropy_and_divergence(tmp_path):
    found = study(tmp_path)
    task = found.tasks["german"]
    reference = Reference(found.base, task)
    same = reference.measure(found.base)
    assert all(not values.any() for values in same.kl.values()), "exactly 0"
    other = copy.deepcopy(found.base)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight += 0.1
    measured = reference.measure(other)
    ids = task.kept["samples"]
    p, q = (logits(model, ids)[:, :-1].double().log_softmax(-1) for model in (found.base, other))
    assert torch.allclose(measured.kl["samples"].double(), (p.exp() * (p - q)).sum(-1), atol=1e-6)
    wanted = F.cross_entropy(logits(other, task.new)[:, :-1].flatten(0, 1), task.new[:, 1:].flatten())
    assert measured.means()["ce_new"] == pytest.approx(wanted.item(), rel=1e-5)
    assert set(measured.means()) == {
        *("ce_new", "ce_samples", "ce_prose", "ce_other"),
        *("kl_samples", "kl_prose", "kl_other"),
    }


def test_means_are_those_of_the_library(tmp_path):
    found = study(tmp_path)
    task = found.tasks["german"]
    other = copy.deepcopy(found.base)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight += 0.1
    before, after = (Reference(found.base, task).measure(model).means() for model in (found.base, other))
    for name, ids in {"new": task.new, **task.kept}.items():
        batches = [{"input_ids": ids, "labels": ids}]
        rise = cross_entropy_rise(other, found.base, batches)
        assert after[f"ce_{name}"] - before[f"ce_{name}"] == pytest.approx(rise, abs=1e-6), name
        if name in task.kept:
            assert after[f"kl_{name}"] == pytest.approx(kl_to_base(other, found.base, batches), rel=1e-4), name


def test_a_model_with_other_logits_is_refused(tmp_path):
    found = study(tmp_path)
    capped = copy.deepcopy(found.base)
    plain = capped.forward
    capped.forward = lambda **kwargs: replaced(plain(**kwargs))

    def replaced(output):
        output.logits = output.logits.tanh()
        return output

    with pytest.raises(ValueError, match="LlamaForCausalLM does more to its logits"):
        Reference(capped, found.tasks["german"])


def test_a_run_has_a_line_for_every_measurement(tmp_path):
    found, rows = study(tmp_path / "work"), Rows(tmp_path / "rows")
    training.train_run(found, RUN, rows)
    ((run, lines),) = rows.runs()
    assert run == RUN
    scales = [(0, 0.0), (2, 1.0), (4, 1.0), (6, 1.0), *((8, k / 8) for k in range(1, 9))]
    assert [(line["step"], line["scale"]) for line in lines] == scales, "with the finer scales of a checked run"
    assert lines[0]["kl_samples"] == 0
    assert lines[0]["environment"]["threads"] == torch.get_num_threads()
    assert lines[-1]["ce_new"] < lines[0]["ce_new"], "it learns"
    for line in lines:
        assert line["status"] == "ok"
        assert line["protocol"] == "p"
        assert line["model"] == "m"
        assert line["text"] == found.tasks["german"].sha256()[:12]
    halves = [line["update"] for line in lines if line["scale"] in (0.5, 1.0) and line["step"] == 8]
    assert halves[0] == pytest.approx(halves[1] / 2)
    items = rows.items(RUN)
    assert {name: tuple(values.shape) for name, values in items.items()} == dict.fromkeys(
        ("ce_new", "ce_samples", "kl_samples"), (8, LENGTH - 1)
    )
    assert items["kl_samples"].float().mean().item() == pytest.approx(lines[-1]["kl_samples"], rel=2e-3)
    assert not (found.work / "states" / f"{RUN.key}.pt").exists()


def test_the_same_run_gives_the_same_bits_wherever_it_was_killed(tmp_path):
    """Killed before every step and every measurement in turn, and resumed from the last checkpoint."""

    class Killed(BaseException):
        pass

    training.train_run(study(tmp_path / "work"), RUN, Rows(tmp_path / "once"))
    for number in range(1, 10):
        found, calls = study(tmp_path / "other"), iter(range(1000))

        def kill(calls=calls, number=number):
            if next(calls) == number:
                raise Killed

        with pytest.raises(Killed):
            training.train_run(found, RUN, Rows(tmp_path / "again"), kill)
        assert not (tmp_path / "again").exists(), "a run is written when it is complete"
    training.train_run(study(tmp_path / "other"), RUN, Rows(tmp_path / "again"))
    assert contents(tmp_path / "again") == contents(tmp_path / "once")


def test_a_run_that_diverges_is_a_result(tmp_path, monkeypatch):
    monkeypatch.setitem(ARMS, "full", replace(ARMS["full"], rate=1e-1))
    run = Run("german", 8, "full", 1e30, 0)
    rows = Rows(tmp_path / "rows")
    training.train_run(study(tmp_path / "work"), run, rows)
    ((_, lines),) = rows.runs()
    assert lines[0]["status"] == "ok"
    assert {line["status"] for line in lines[1:]} == {"diverged"}
    assert len(lines) == 8
    assert "NaN" not in (tmp_path / "rows" / "runs" / f"{run.key}.jsonl").read_text()
    assert rows.items(run) == {}


def test_the_order_is_balanced():
    design = replace(DESIGN, waves=waves(60, 240, ()))
    planned = list(design.order({cell: (ARMS[cell[2]].rate, 1.0, 2.0) for cell in design.cells()}))
    assert len(planned) == len(set(planned)) == 2 * 4 * 3 * (10 + 5)
    for end in range(len(planned)):
        for task, steps in ((task, steps) for task in design.tasks for steps in (60, 240)):
            made = [run for run in planned[:end] if (run.task, run.steps) == (task, steps)]
            counts = [sum(run.arm == arm for run in made) for arm in MAIN]
            assert max(counts) - min(counts) <= 1


@pytest.mark.slow
def test_what_was_made_is_not_made_again(uninterrupted):
    before = contents(uninterrupted)
    rows, runners = Rows(uninterrupted / "rows"), Runners(uninterrupted / "work")
    assert sum(1 for _ in rows.runs()) >= 24, "three rates of two arms on two tasks with two seeds, or more"
    assert collect(study(uninterrupted / "work"), rows, runners) == 0
    assert contents(uninterrupted) == before
    text = how_far(DESIGN, rows, runners, 1.0)
    assert "about 0 core hours remain" in text
    assert "at work: nobody" in text


def test_a_part_of_the_runs_in_the_same_order(tmp_path):
    rows, runners = Rows(tmp_path / "rows"), Runners(tmp_path / "work")
    part = Part(tasks=("cpp",), steps=(8,), arms=("lora",))
    assert collect(study(tmp_path / "work"), rows, runners, 3, part) == 3
    planned = [run for run in DESIGN.order(grids(DESIGN, rows)) if (run.task, run.arm) == ("cpp", "lora")]
    assert {run for run, _ in rows.runs()} == set(planned[:3])
    far = how_far(DESIGN, rows, runners, 1.0, part)
    assert "german" not in far
    assert "middle" not in far
    assert "about 0 core hours" in far
    first = list(Part(arms=("lora",), center=True).of(DESIGN.order(grids(DESIGN, rows)), DESIGN))
    assert {(run.arm, run.rate) for run in first} == {("lora", ARMS["lora"].rate)}
    assert len(first) == 4, "two tasks, two seeds"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--arms", "lora", "middel"], "no arm middel in this study; it has middle, lora, "),
        (["--steps", "300"], "no length 300 in this study; it has 60, 240"),
        (["--tasks", "french", "--how-far"], "no task french in this study; it has german, cpp"),
    ],
)
def test_a_part_that_is_not_in_the_protocol_is_named(words, told):
    with pytest.raises(SystemExit, match=re.escape(f"error: {told}")):
        main(PROTOCOL, None, None, words)


def test_rows_of_another_protocol_model_or_text_are_not_mixed(begun):
    rows = Rows(begun / "rows")
    with pytest.raises(ValueError, match="runs of another protocol, such as cpp-8-"):
        check(study(begun / "work", protocol="other"), rows)
    with pytest.raises(ValueError, match="another protocol and model"):
        check(study(begun / "work", protocol="other", model="other"), rows)
    changed = study(begun / "work")
    changed.tasks["cpp"].kept["samples"][0, 0] = VOCABULARY - 1
    with pytest.raises(ValueError, match="another text"):
        check(changed, rows)


@pytest.mark.parametrize("damage", ["", "{", '{"task": "german"}\n'])
def test_a_damaged_file_is_named(begun, tmp_path, damage):
    rows = Rows(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "german-8-middle-1e-03-seed0.jsonl").write_text(damage)
    with pytest.raises(ValueError, match=r"german-8-middle-1e-03-seed0\.jsonl is damaged"):
        list(rows.runs())
    other = next((begun / "rows" / "runs").glob("german-8-lora*"))
    (tmp_path / "runs" / "german-8-middle-1e-03-seed0.jsonl").write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match="holds the run german-8-lora"):
        list(rows.runs())


def test_a_run_belongs_to_one_runner(tmp_path):
    first, second = Runners(tmp_path), Runners(tmp_path)
    with first.claim("a") as mine:
        assert mine
        assert second.is_claimed("a")
        assert not second.is_claimed("b")
    assert not second.is_claimed("a")


def test_paused_runners_wait(tmp_path):
    runners = Runners(tmp_path)
    runners.wait()
    runners.pause(True)
    waiting = threading.Thread(target=Runners(tmp_path).wait)
    waiting.start()
    time.sleep(0.2)
    assert waiting.is_alive()
    runners.pause(False)
    waiting.join(timeout=10)
    assert not waiting.is_alive()


def test_a_recorded_run_is_made_again(begun, tmp_path):
    found, rows = study(begun / "work"), Rows(begun / "rows")
    before = contents(begun)
    assert again(found, rows, 1) == 0.0, "the same bits here"
    with pytest.raises(ValueError, match="holds 0 runs that can be made again, fewer than 1"):
        again(found, rows, 1, Part(steps=(9,)))
    assert contents(begun) == before
    with pytest.raises(ValueError, match="holds 3 runs that can be made again, fewer than 4"):
        again(found, rows, 4)
    shutil.copytree(begun / "rows", tmp_path / "rows")
    for path in (tmp_path / "rows" / "runs").glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[-1]["kl_samples"] *= 1.1
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"kl_samples at step 8, λ = 1 is .*, recorded is .*; at most 5% are expected"):
        again(found, Rows(tmp_path / "rows"), 1)


def start(folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


@pytest.mark.slow
def test_two_runners_killed_four_times_lose_double_or_halve_no_row(uninterrupted, tmp_path):
    chance = random.Random(0)
    for _ in range(4):
        both = [start(tmp_path) for _ in range(2)]
        runs = tmp_path / "rows" / "runs"
        before = len(list(runs.glob("*"))) if runs.exists() else 0
        while not runs.exists() or len(list(runs.glob("*.jsonl"))) <= before:  # at least one more run is complete
            assert all(process.poll() in (None, 0) for process in both), both[0].stderr.read()
            if all(process.poll() == 0 for process in both):
                break
            time.sleep(0.01)
        time.sleep(chance.random() * 0.2)
        for process in both:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        for path in runs.glob("*.jsonl"):
            assert [json.loads(line) for line in path.read_text().splitlines()]
    last = start(tmp_path)
    assert last.wait() == 0, last.stderr.read().decode()
    rows = {p: b for p, b in contents(tmp_path / "rows").items() if not p.name.startswith(".")}
    assert rows == contents(uninterrupted / "rows")


def test_extended_grids_are_run(tmp_path):
    """A best rate at an edge brings the next one."""
    design = replace(
        DESIGN, tasks=("german",), waves=(Wave(8, ("middle",), (0, 1), True), Wave(8, ("middle",), (0, 1), False))
    )
    found = study(tmp_path / "work", design)
    collect(found, Rows(tmp_path / "rows"), Runners(tmp_path / "work"))
    rates = sorted({run.rate for run, _ in Rows(tmp_path / "rows").runs()})
    assert len(rates) > 3, "with a random model the highest rate of the first three reaches the target at least cost"
