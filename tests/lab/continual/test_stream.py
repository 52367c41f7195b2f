"""A stream's scores by hand, what it asks of its tasks, its table, CSV and picture."""

import csv
import math
from dataclasses import replace

import pytest
import torch

from ipca.lab.continual import METHODS, ContinualLearner, StreamTask, TaskMatrix, draw_stream, run_stream
from tests.helpers.continual import SETTINGS, plain, train

NAMES = ("one", "two", "three")
# before any task, then after each: R[i, j] is the score on task j after training task i
SCORES = [[0.1, 0.2, 0.3], [0.9, 0.2, 0.4], [0.7, 0.8, 0.5], [0.6, 0.9, 1.0]]
KNOWN = [1.0, 0.9, 0.8, 0.6]


class Scripted:
    """Tasks that give the scores above, and remember how they were called."""

    def __init__(self):
        self.done, self.calls = 0, []

    def tasks(self):
        return [StreamTask(name, self.train, self.score(i)) for i, name in enumerate(NAMES)]

    def train(self, learner, seed):
        self.calls.append((seed, torch.initial_seed(), learner.running, learner.model.training))
        train(learner, steps=1)
        self.done += 1

    def score(self, task):
        def evaluate(model):
            assert not model.training
            assert not torch.is_grad_enabled()
            return torch.tensor(SCORES[self.done][task])

        return evaluate

    def known(self, model):
        return KNOWN[self.done]


def stream(method="fresh", script=None, **options):
    script = script or Scripted()
    learner = ContinualLearner(plain(), method, SETTINGS, tasks=3, **options)
    return run_stream(learner, script.tasks(), retained=script.known)


def test_the_scores_are_where_they_belong():
    result = stream()
    for i, row in enumerate(SCORES[1:]):
        assert [float(score) for score in result.matrix.R[i]] == pytest.approx(row)
    assert [float(score) for score in result.matrix.initial] == pytest.approx(SCORES[0])
    assert result.retained == tuple(KNOWN)
    assert result.mean_scores == pytest.approx([0.9, 0.75, 2.5 / 3])
    assert result.matrix.acc == pytest.approx(2.5 / 3)
    assert result.matrix.bwt == pytest.approx(((0.6 - 0.9) + (0.9 - 0.8)) / 2)
    assert result.matrix.forgetting == pytest.approx(((0.9 - 0.6) + (0.8 - 0.9)) / 2)


def test_tasks_are_trained_in_order_with_seeds_of_their_own():
    calls = []
    for seed in (0, 3):
        script = Scripted()
        stream(script=script, seed=seed)
        calls += script.calls
    assert len({seed for seed, *_ in calls}) == 6
    assert [seed for seed, *_ in calls][0::3] == [0, 3]
    assert all(seed == given and running and training for seed, given, running, training in calls)


def test_every_method_runs_a_stream():
    for method in METHODS:
        result = stream(method)
        assert (result.method, len(result.records), result.names) == (method, 3, NAMES)


def test_judging_leaves_the_modes_as_they_were():
    learner = ContinualLearner(plain().eval(), "fresh", SETTINGS)
    learner.model.head.train()
    script = Scripted()
    run_stream(learner, script.tasks())
    assert not any(training for *_, training in script.calls)
    assert learner.model.head.training
    assert not learner.model.a.training


def test_a_score_that_fails_or_draws_leaves_no_trace():
    model = plain().train()
    state = torch.get_rng_state()

    def fails(model):
        torch.rand(3)
        raise KeyError("no data")

    tasks = [StreamTask(name, train, fails) for name in NAMES]
    with pytest.raises(KeyError):
        run_stream(ContinualLearner(model, "fresh", SETTINGS), tasks)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_table_has_every_number():
    result = stream("sd-lora", seed=3)
    title, head, before, *lines, summary = str(result).splitlines()
    assert title == "sd-lora, seed 3"
    assert before.split() == ["(before)", "0.100", "0.200", "0.300", "1.000", "0", "0", "0"]
    assert lines[1].split() == ["two", "0.700", "0.800", "0.500", "0.750", "0.800", "299", "386", "1,544"]
    assert len({len(line) for line in (head, before, *lines)}) == 1
    assert summary == "ACC 0.833   BWT -0.100   FM 0.100   FWT +0.100"


def test_without_a_score_for_what_it_knew_the_column_is_empty():
    script = Scripted()
    result = run_stream(ContinualLearner(plain(), "fresh", SETTINGS), script.tasks())
    assert result.retained == ()
    assert {row["retained"] for row in result.rows()} == {None}
    assert str(result).splitlines()[2].split() == ["(before)", "0.100", "0.200", "0.300", "0", "0", "0"]


def test_the_csv_file_holds_the_rows(tmp_path):
    result = stream("lora")
    result.to_csv(tmp_path / "made" / "stream.csv")
    with (tmp_path / "made" / "stream.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ["method", "seed", "after", "mean", "retained", "trained", "kept_parameters", "kept_bytes"]
    assert list(rows[0]) == [*columns, "score one", "score two", "score three"]
    assert [row["after"] for row in rows] == ["", *NAMES]
    assert [float(row["score two"]) for row in rows] == pytest.approx([0.2, 0.2, 0.8, 0.9])
    assert [int(row["trained"]) for row in rows] == [0, 297, 297, 297]


def test_the_picture_is_drawn_for_one_and_for_several(tmp_path):
    pytest.importorskip("matplotlib")
    draw_stream(stream(), tmp_path / "one.png")
    draw_stream([stream(method) for method in METHODS], tmp_path / "all.svg")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.svg", "one.png"]


@pytest.mark.parametrize(("seeds", "intervals"), [(2, 0), (3, 3)])
def test_seeds_are_drawn_as_their_mean_with_intervals_from_three_on(seeds, intervals, tmp_path, drawn):
    pytest.importorskip("matplotlib")
    first = stream()
    shifted = [TaskMatrix(first.matrix.R * (1 - 0.1 * k), names=NAMES) for k in range(seeds)]
    results = [replace(first, seed=k, matrix=matrix) for k, matrix in enumerate(shifted)]
    draw_stream([*results, replace(first, method="other")], tmp_path / "all.png")
    one, other, scores, bar = drawn[0].axes
    assert [one.get_title(), other.get_title()] == [f"fresh, mean of {seeds} seeds", "other, seed 0"]
    assert one.images[0].get_array().tolist() == pytest.approx(sum(m.R for m in shifted) / seeds)
    assert [axis.images[0].get_clim() for axis in (one, other)] == [(0, 1)] * 2
    assert bar.get_xlabel() == "score"
    mean, *whiskers, last = scores.lines
    assert len(whiskers) == intervals
    assert mean.get_linestyle() != last.get_linestyle()
    assert mean.get_marker() != last.get_marker()


def test_a_picture_needs_streams_over_the_same_tasks(tmp_path):
    with pytest.raises(ValueError, match="at least one stream"):
        draw_stream([], tmp_path / "none.png")
    script = Scripted()
    other = run_stream(ContinualLearner(plain(), "fresh", SETTINGS), script.tasks()[:2])
    with pytest.raises(ValueError, match="the same tasks in all"):
        draw_stream([stream(), other], tmp_path / "none.png")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_picture_format_leaves_no_file(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="nothing"):
        draw_stream(stream(), tmp_path / "picture.nothing")
    assert list(tmp_path.iterdir()) == []


def test_a_used_learner_is_refused():
    learner = ContinualLearner(plain(), "fresh", SETTINGS)
    learner.begin_task()
    with pytest.raises(ValueError, match="this one has already begun 1 tasks"):
        run_stream(learner, Scripted().tasks())


@pytest.mark.parametrize(
    ("names", "words"),
    [([], "got none"), (["one"], "got one"), (["one", "one"], "got one, one"), (["one", "after"], "got one, after")],
)
def test_tasks_without_names_of_their_own_are_refused(names, words):
    tasks = [StreamTask(name, train, train) for name in names]
    with pytest.raises(ValueError, match=words):
        run_stream(ContinualLearner(plain(), "fresh", SETTINGS), tasks)


@pytest.mark.parametrize("found", [None, {"accuracy": 1.0}, torch.ones(2)])
def test_a_score_of_another_kind_names_its_task(found):
    tasks = [StreamTask(name, train, lambda model: found) for name in ("x", "y")]
    with pytest.raises(TypeError, match=r"x: evaluate\(model\) must return a number, got "):
        run_stream(ContinualLearner(plain(), "fresh", SETTINGS), tasks)


def test_what_is_no_task_is_refused():
    with pytest.raises(TypeError, match="the task 'x': evaluate must be a function, got 3"):
        StreamTask("x", train, 3)
    with pytest.raises(TypeError, match=r"tasks must be ipca.lab.continual.StreamTask, got \('x', 1, 2\)"):
        run_stream(ContinualLearner(plain(), "fresh", SETTINGS), [("x", 1, 2)])


def test_a_task_that_diverged_stops_the_stream_whatever_its_scores():
    def diverge(learner, seed):
        with torch.no_grad():
            learner.model.a.lora_B.fill_(torch.nan)

    tasks = [StreamTask(name, diverge, lambda model: 0.5) for name in ("x", "y")]
    learner = ContinualLearner(plain(), "fresh", SETTINGS)
    with pytest.raises(ValueError, match=r"task 0: a\.lora_B holds NaN or Inf, so training diverged"):
        run_stream(learner, tasks)
    assert bool(learner.model.a.base_weight.isfinite().all())


def test_a_score_that_is_no_number_stops_the_stream():
    script = Scripted()
    tasks = [*script.tasks()[:1], StreamTask("lost", script.train, lambda model: math.nan if script.done else 0.5)]
    with pytest.raises(ValueError, match="lost: the score is nan, not finite"):
        run_stream(ContinualLearner(plain(), "fresh", SETTINGS), tasks)
    assert script.done == 1


def test_a_learner_for_fewer_tasks_is_refused():
    learner = ContinualLearner(plain(), "disjoint", SETTINGS, tasks=2)
    with pytest.raises(ValueError, match="the learner is for 2 tasks, but the stream has 3"):
        run_stream(learner, Scripted().tasks())
