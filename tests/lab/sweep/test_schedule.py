"""The plan of a sweep: what it counts, what it finds finished, the time it gives; and a bar that never goes back."""

import json
from pathlib import Path

import pytest

from ipca.lab import sweep
from ipca.lab.sweep.plan import Grid
from ipca.lab.sweep.schedule import Plan, duration
from tests.helpers import sweep_task

TASK = Path(sweep_task.__file__)
GRID = {"windows": (0.0, 0.5), "lrs": (1e-3, 1e-2), "seeds": 2, "methods": ("lora", "haar"), "early": 2}
QUIET = {"progress": False, "report": False}


@pytest.fixture
def quick(monkeypatch):
    """Runs that train nothing; those whose method and comparison are in the set fail."""
    fails = set()

    def run_trial(task, base, trial, **options):
        ok = (trial.method, trial.comparison) not in fails
        row = {"method": trial.method, "comparison": trial.comparison, "lr": trial.lr, "seed": trial.seed, "step": None}
        numbers = {"early_update": 0.01 * trial.lr, "target": trial.lr if ok else None, "retained": 1.0}
        return [{**row, **numbers, "status": "ok" if ok else "failed"}]

    monkeypatch.setattr("ipca.lab.sweep.workers.run_trial", run_trial)
    return fails


def test_trainings_are_counted_by_method_and_stage_and_nothing_is_written(tmp_path):
    plan = sweep.plan_sweep(TASK, tmp_path / "out", **GRID, tune=3)
    assert not (tmp_path / "out").exists()
    assert plan.counts["same"] == {"0.0": 4, "0.5": 4, "lora": 4, "haar": 4}
    assert plan.counts["sqrt-sigma"] == {"0.0": 4, "0.5": 4}
    assert plan.counts["update"] == {"0.0": 4, "lora": 4}  # the reference keeps its rates
    assert plan.counts["tuning"] == dict.fromkeys(("0.0", "0.5", "lora", "haar"), 3 * 2)
    assert plan.counts["tuned"] == dict.fromkeys(("0.0", "0.5", "lora", "haar"), 2)
    assert (plan.total, plan.left, plan.exact) == (16 + 8 + 8 + 24 + 8, 64, False)
    assert plan.seconds_left is None
    assert plan.line() == (
        "2 windows + lora + 1 control × 2 rates × 2 seeds: at most 64 trainings (16 same, 8 sqrt-sigma, 8 update, "
        "24 tuning, 8 tuned). None is finished, so the time is not known before the first."
    )
    assert str(plan).splitlines()[-1].split() == ["all", "16", "8", "8", "24", "8", "64"]


def test_finished_trainings_give_the_time_and_more_seeds_keep_them(tmp_path, quick):
    sweep.run(TASK, tmp_path, **GRID, **QUIET)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    plan = sweep.plan_sweep(TASK, tmp_path, **GRID)
    took = [json.loads(path.read_text())["seconds"] for path in (tmp_path / "trials").iterdir()]
    assert (plan.total, plan.left, plan.exact) == (32, 0, True)
    assert sorted(plan.seconds) == sorted(took)
    assert plan.line().endswith("s each, none left.")
    more = sweep.plan_sweep(TASK, tmp_path, **{**GRID, "seeds": 3}, workers=2)
    assert (more.total, len(more.seconds)) == (48, 24)  # rates of equal updates are others with more seeds
    assert more.seconds_left == pytest.approx(24 * sum(more.seconds) / 24 / 2)
    assert "; 24 left, about " in more.line()
    assert "with 2 workers" in more.line()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_method_without_a_tuned_rate_is_not_counted_once_that_is_known(tmp_path, quick):
    quick.add(("lora", "tuning"))
    options = {**GRID, "comparisons": ("same",), "tune": 2}
    sweep.run(TASK, tmp_path, **options, **QUIET)
    plan = sweep.plan_sweep(TASK, tmp_path, **options)
    assert set(plan.counts["tuned"]) == {"0.0", "0.5", "haar"}
    assert (plan.left, plan.exact) == (0, True)


def test_the_plan_of_a_folder_of_another_sweep_is_refused_as_the_sweep_is(tmp_path, quick):
    sweep.run(TASK, tmp_path, **{**GRID, "comparisons": ("same",), "methods": ()}, **QUIET)
    with pytest.raises(ValueError, match=r"contains another sweep: early differ \(early was 2, is now 3\)"):
        sweep.plan_sweep(TASK, tmp_path, **{**GRID, "early": 3})
    assert sweep.plan_sweep(TASK, tmp_path, **{**GRID, "early": 3}, overwrite=True).seconds == ()
    assert len(list((tmp_path / "trials").iterdir())) == 2 * 2 * 2


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (90, "2 min"), (3569, "59 min"), (12_000, "3 h 20 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_there_are_no_more_workers_than_trainings_left():
    grid = Grid.of((0.5,), (1e-3,), 2, (), ("same",), "0.5")
    assert Plan(grid, grid.counts(), True, (10.0,), workers=4).seconds_left == 10


class Bar:
    """Stands in for tqdm's bar, and keeps every ``(n, total)`` it shows."""

    disable = False

    def __init__(self, *, total, **options):
        self.total, self.n, self.initial = total, 0, 0
        self.refresh()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.refresh()

    def refresh(self):
        self.seen.append((self.n, self.total))

    def update(self):
        self.n += 1
        self.refresh()

    @staticmethod
    def write(line, file):
        Bar.lines.append(line)


def test_the_bar_holds_all_stages_from_the_start_and_never_goes_back(tmp_path, monkeypatch, quick):
    monkeypatch.setattr(Bar, "seen", [], raising=False)
    monkeypatch.setattr(Bar, "lines", [], raising=False)
    monkeypatch.setattr("ipca.lab.sweep.driver.tqdm", Bar)
    monkeypatch.setattr("ipca.lab.sweep.driver.cache_windows", lambda *given, **options: None)
    options = {**GRID, "tune": 2}
    rows = sweep.run(TASK, tmp_path, **options, report=False)
    assert Bar.lines == [sweep.plan_sweep(TASK, tmp_path / "new", **options).line()]
    assert Bar.seen[0] == (0, 32 + 16 + 8)
    assert Bar.seen[-1] == (56, 56)
    assert all(total == 56 and n < 56 for n, total in Bar.seen[1:-2])
    assert len(rows) == 1 + 32 + 8
    Bar.seen.clear()
    sweep.run(TASK, tmp_path, **options, report=False)
    assert Bar.seen[-1] == (56, 56)
