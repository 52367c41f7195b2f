"""The continual study: order and grids, rules of verdicts, the page, runners, and one short stream."""

import gzip
import json
import math
import pickle

import numpy as np
import pytest
import torch

from studies.continual import page, run, silhouettes, stream
from studies.continual.analysis import Analysis
from studies.continual.design import CENTERS, COMPARED, RATES, SEEDS, Run, best_rate, grid, order, protocol_sha256
from studies.continual.rows import Rows
from studies.frontier.run import Runners
from studies.window_position.pretraining import Pretraining


def row(made: Run, acc: float):
    values = {"acc": acc, "bwt": acc - 1, "retained_after": acc / 2, "retained_before": 0.75} if acc == acc else {}
    return {
        "method": made.method,
        "rate": made.rate,
        "seed": made.seed,
        "protocol": protocol_sha256(),
        "model": "m",
        **values,
    }


def usual(made: Run) -> float:
    """The second rate of a method is the best."""
    far = abs(math.log10(made.rate / CENTERS[made.method]))
    noise = math.sin(7 * made.seed + far + list(CENTERS).index(made.method))
    return 0.9 - 0.05 * far + 0.001 * noise


def fill(folder, acc=usual, seeds: int = SEEDS) -> Rows:
    """Streams of all methods until none is left."""
    rows = Rows(folder)
    while todo := [made for made in order(rows.scores()) if made.seed < seeds and not rows.has(made)]:
        for made in todo:
            (folder / f"{made.key}.json").write_text(json.dumps(row(made, acc(made))))
    return rows


def test_all_methods_get_their_first_rates_of_a_seed_before_the_next_seed():
    first = list(order({}))[: 3 * len(CENTERS)]
    assert {made.seed for made in first} == {0}
    assert {made.method for made in first} == set(CENTERS)
    assert all(len({made.rate for made in first if made.method == method}) == 3 for method in CENTERS)


@pytest.mark.parametrize(("best", "grows"), [(0, "down"), (1, None), (2, "up")])
def test_a_grid_grows_on_the_side_of_an_edge(best, grows):
    start = RATES.index(CENTERS["fresh"]) - 1
    three = RATES[start : start + 3]
    scores = {rate: {0: float(i == best), 1: float(i == best)} for i, rate in enumerate(three)}
    more = {"down": RATES[start - 1 : start + 3], "up": RATES[start : start + 4], None: three}[grows]
    assert grid("fresh", scores) == more
    assert grid("fresh", {rate: {0: score[0]} for rate, score in scores.items()}) == three


def test_a_stream_that_diverged_counts_as_0():
    assert best_rate({1e-3: {0: 0.5, 1: 0.5}, 3e-3: {0: math.nan, 1: 0.9}}) == 1e-3


@pytest.mark.parametrize(
    ("shift", "verdict"), [(0.03, "lower"), (-0.03, "higher"), (0.0, "alike"), (None, "collecting: 4 of 10 seeds")]
)
def test_a_verdict_follows_the_rules(tmp_path, shift, verdict):
    seeds = SEEDS if shift is not None else 4
    rows = fill(tmp_path, lambda made: usual(made) + (shift or 0) * (made.method == "osf"), seeds)
    found = next(each for each in Analysis(rows).compared() if each.method == "osf")
    assert (found.verdict or found.why) == verdict
    assert found.mean == pytest.approx(-(shift or 0.0), abs=2e-3)
    assert (found.adjusted is None) == (shift is None)
    assert verdict.partition(":")[0] in page.comparisons([found])


def test_a_shown_difference_within_one_point_is_alike(tmp_path):
    rows = fill(tmp_path, lambda made: usual(made) + 0.006 * (made.method == "osf"))
    found = next(each for each in Analysis(rows).compared() if each.method == "osf")
    assert (found.verdict, found.direction, found.words) == ("alike", "lower", "alike (lower)")
    assert "alike, within one point, though shown to be lower (−0.006" in page.sentence(found)


def test_a_best_rate_at_an_edge_gives_no_verdict(tmp_path):
    """The lower the better, down to the last rate there is."""
    rows = fill(tmp_path, lambda made: 0.5 - 0.05 * math.log10(made.rate) if made.method == "milora" else usual(made))
    found = {each.method: each for each in Analysis(rows).compared()}
    assert found["milora"].why == "the best rate of milora is an edge of the grid"
    assert found["milora"].adjusted is None
    assert all(each.verdict for method, each in found.items() if method != "milora")
    assert "| 3e-06, edge |" in page.methods(Analysis(rows))


def test_a_rate_that_is_best_for_one_seed_is_an_edge_and_the_grid_grows(tmp_path):
    """The center is best on all seeds; without seed 0, with which the lower rate is poor, that one is."""
    low, center = grid("fresh", {})[:2]

    def acc(made):
        if made.method != "fresh":
            return usual(made)
        if made.rate < low:
            return 0.5
        return {low: 0.9 - 0.05 * (made.seed == 0), center: 0.899}.get(made.rate, 0.8)

    analysis = Analysis(fill(tmp_path, acc))
    assert analysis.best("fresh") == center
    assert analysis.taken("fresh") == {low: 1, center: SEEDS - 1}
    assert analysis.rates("fresh")[0] == RATES[RATES.index(low) - 1], "one rate more below it"
    assert not analysis.is_edge("fresh")
    for path in tmp_path.glob(f"fresh-{RATES[RATES.index(low) - 1]:.0e}-*"):
        path.unlink()
    assert analysis_of_three(tmp_path).is_edge("fresh")
    assert f"{low:g} (1), {center:g} ({SEEDS - 1})" in page.methods(analysis)


def analysis_of_three(folder):
    """The analysis with the first three rates only."""
    found = Analysis(Rows(folder))
    found.rates = lambda method: grid(method, {})
    found.seeds = lambda method: list(range(SEEDS))
    return found


def test_every_rate_is_in_a_table(tmp_path):
    analysis = Analysis(fill(tmp_path))
    lines = page.every_rate(analysis).splitlines()
    assert lines[0] == "| method | 3e-05 | 0.0001 | 0.0003 | 0.001 | 0.003 |"
    (fresh,) = (line for line in lines if line.startswith("| fresh middle windows |"))
    mean = sum(usual(Run(seed, "fresh", 3e-4)) for seed in range(SEEDS)) / SEEDS
    assert f"| {mean:.3f} / {mean / 2:.3f} |" in fresh
    assert fresh.startswith("| fresh middle windows | – |")


def test_the_rate_of_a_seed_is_chosen_on_the_others(tmp_path):
    low = grid("fresh", {})[0]
    lucky = Run(0, "fresh", low)  # the best of seed 0, of no other
    found = Analysis(fill(tmp_path, lambda made: 1.0 if made == lucky else usual(made), seeds=3)).tuned("fresh")
    assert found[0] < 0.95


def test_the_page_is_made_from_rows(tmp_path):
    analysis = Analysis(fill(tmp_path))
    made = page.sections(analysis)
    assert made["findings"].count("\n- ") == len(COMPARED) - 1
    assert "alike, within one point" in made["findings"]
    assert all(page.NAMES[method] in made["methods"] for method in CENTERS)
    assert "Before the first task the accuracy on digits is 0.750." in made["methods"]
    (figure,) = page.draw(analysis).values()
    assert all(len(axis.lines) == 2 * len(CENTERS) for axis in figure.axes), "a mark and an interval each"
    assert page.sections(Analysis(Rows(tmp_path / "none")))["findings"] == "Not run."


def test_rows_of_another_protocol_or_damaged_ones_are_refused(tmp_path):
    made = Run(0, "fresh", 1e-3)
    Rows(tmp_path).put(made, row(made, 0.5) | {"protocol": "other"})
    with pytest.raises(ValueError, match="a run of another protocol"):
        Rows(tmp_path).all()
    (tmp_path / f"{made.key}.json").write_text("{")
    with pytest.raises(ValueError, match=r"is damaged: .*; delete it"):
        Rows(tmp_path).all()


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """A model of a few steps of pretraining, and images of noise."""

    def pair(first):
        generator = torch.Generator().manual_seed(first)
        images, second = torch.rand(24, 8, 8, generator=generator), torch.arange(24) % 2
        return silhouettes.Pair(images[:16], second[:16], images[16:], second[16:])

    monkeypatch.setenv("IPCA_STUDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stream, "pair", pair)
    monkeypatch.setattr(stream, "STEPS", 2)
    monkeypatch.setattr(stream, "PAIRS", (0, 2))
    monkeypatch.setattr(stream, "Pretraining", lambda: Pretraining(steps=3))


def test_a_stream_is_made_once_and_again_to_the_bit(made_up, tmp_path):
    rows = Rows(tmp_path / "rows")
    assert run.collect(rows, Runners(tmp_path), 1, progress=False) == 1
    assert [made.method for made in rows.all()] == ["fresh"]
    found = {made: dict(one) for made, one in rows.all().items()}
    assert all(0 <= one["acc"] <= 1 and one["status"] == "ok" for one in found.values())
    made = next(iter(found))
    assert stream.one_stream(made) == found[made]
    assert "1 of 300 streams" in run.how_far(rows)


def test_streams_of_another_base_model_are_not_mixed(made_up, tmp_path):
    one, two = Run(0, "fresh", 1e-3), Run(1, "fresh", 1e-3)
    rows = Rows(tmp_path / "rows")
    rows.put(one, row(one, 0.5))
    with pytest.raises(ValueError, match=r"rows holds streams of another base model \(m, here it is [0-9a-f]{12}\)"):
        run.collect(rows, Runners(tmp_path), 1, progress=False)
    rows.put(two, row(two, 0.5) | {"model": "other"})
    with pytest.raises(ValueError, match=r"fresh-1e-03-seed1\.json started from another base model than others"):
        rows.all()


def test_a_stream_that_diverges_is_a_row_without_values(made_up):
    found = stream.one_stream(Run(0, "lora-fresh", 1e30))
    assert found["status"].startswith("diverged")
    assert "acc" not in found
    json.dumps(found)


def test_images_are_read_without_running_the_pickle(tmp_path):
    images = np.arange(10_000 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(10_000, 28, 28)
    animals = np.arange(10_000) % 10
    for name, array in (("images", images), ("animals", animals)):
        (tmp_path / name).write_bytes(gzip.compress(pickle.dumps(array, protocol=4), 1))
    assert np.array_equal(silhouettes._array(tmp_path / "images", np.uint8), images.ravel())
    assert np.array_equal(silhouettes._array(tmp_path / "animals", np.int64), animals)
