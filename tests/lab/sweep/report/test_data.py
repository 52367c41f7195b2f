"""Reading a sweep's folder, and the ways in which its rows are compared."""

import json

import pytest

from ipca.lab.sweep import frame
from ipca.lab.sweep.report.comparisons import middle_rate, views
from ipca.lab.sweep.report.data import read_sweep
from tests.helpers.sweep_rows import Made, by_hand, write_rows

SMALL = {"windows": ("0.0", "0.5", "1.0"), "methods": ("lora", "haar"), "seeds": 3}


def test_a_sweep_reads_back(tmp_path):
    sweep = read_sweep(Made(**SMALL, checkpoints=(5,), fails={"lora": 2e-3}).write(tmp_path))
    assert sweep.methods == ("0.0", "0.5", "1.0", "lora", "haar")
    assert sweep.positions == {"0.0": 0.0, "0.5": 0.5, "1.0": 1.0}
    assert sweep.metrics == ("target", "retained", "drift")
    assert (sweep.lrs, sweep.seeds) == ((5e-4, 1e-3, 2e-3), (0, 1, 2))
    assert sweep.base == {"target": 0.5, "retained": 0.85, "drift": 0.0}
    assert sweep.settings["device"] == "cpu x86_64"
    assert len(sweep.runs) == 2 * len(sweep.ends)
    assert set(sweep.values("0.0", "target", "same", 1e-3)) == {0, 1, 2}
    assert sweep.values("lora", "target", "same", 2e-3) == {}
    assert sweep.label("target") == "accuracy on reviews"
    assert sweep.label("drift") == "drift"


@pytest.mark.parametrize(("named", "found"), [("0.5", "0.5"), ("middle", "0.5"), ("minor", "1.0"), ("0.3", None)])
def test_the_reference_is_found_under_another_name(named, found, tmp_path):
    folder = Made(**SMALL).write(tmp_path)
    settings = json.loads((folder / "settings.json").read_text()) | {"reference": named}
    (folder / "settings.json").write_text(json.dumps(settings))
    assert read_sweep(folder).reference == found


def test_windows_without_a_position_come_after_those_with_one(tmp_path):
    rows = [by_hand(method, 0, 0.5, 0.5) for method in ("lora", "start=7", "1.0", "middle")]
    sweep = read_sweep(write_rows(tmp_path, rows))
    assert sweep.methods == ("middle", "1.0", "start=7", "lora")
    assert sweep.positions == {"middle": 0.5, "1.0": 1.0}


@pytest.mark.parametrize("name", ["rows.csv", "settings.json"])
def test_a_folder_without_a_sweep_says_what_is_missing(name, tmp_path):
    folder = Made(**SMALL).write(tmp_path)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"contains no {name}; pass the folder that a sweep wrote"):
        read_sweep(folder)


def test_a_missing_column_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"rows.csv lacks the columns comparison, status; it has method, kind"):
        read_sweep(Made(**SMALL, drop=("comparison", "status")).write(tmp_path))


def test_a_cell_that_is_no_number_is_named_with_its_line(tmp_path):
    folder = write_rows(tmp_path, [by_hand("0.5", 0, 0.5, 0.5), by_hand("0.5", 1, "high", 0.5)])
    with pytest.raises(ValueError, match=r"rows.csv, line 3: target is 'high', not a number"):
        read_sweep(folder)


AGAIN = "; run the sweep again, which writes the file from its finished trials"


def cut_line(text: bytes) -> bytes:
    lines = text.splitlines(keepends=True)
    return b"".join(lines[:2]) + lines[2][:30]


DAMAGED_ROWS = {
    "cut": (cut_line, r"line 3: it has \d+ of 15 cells"),
    "cut between": (lambda text: text.replace(b",ok,", b",ok\n", 1), r"line 2: it has \d+ of 15 cells"),
    "a cell more": (lambda text: text.replace(b",ok,", b",ok,,", 1), r"line 2: it has 16 of 15 cells"),
    "no text": (lambda text: b"\xff\xfe\x00" + text, "line 1: it is not in UTF-8"),
    "no text at the end": (lambda text: text.replace(b"lora", b"l\xf6ra"), r"line \d\d: it is not in UTF-8"),
    "a number cut": (lambda text: text[:-3], r"line \d+: the file ends within it"),
    "empty": (lambda text: b"", "line 0: the file is empty"),
    "a quote": (lambda text: text + b'"0.5', r"line \d+: unexpected end of data"),
}


@pytest.mark.parametrize("damage", DAMAGED_ROWS)
@pytest.mark.parametrize("read", [read_sweep, frame])
def test_a_damaged_table_is_named_with_its_line(read, damage, tmp_path):
    pytest.importorskip("pandas")
    folder, (change, says) = Made(**SMALL).write(tmp_path), DAMAGED_ROWS[damage]
    path = folder / "rows.csv"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"rows\.csv, {says}.*{AGAIN}"):
        read(folder)


@pytest.mark.parametrize(
    "text", [b'{"fixed": {', b"[]", b"3", b"null", b'{"fixed": 3}', b'{"labels": []}', b"\xff", b""]
)
def test_damaged_settings_are_named(text, tmp_path):
    folder = Made(**SMALL).write(tmp_path)
    (folder / "settings.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"settings\.json is damaged: .+{AGAIN}"):
        read_sweep(folder)


@pytest.mark.parametrize("seed", ["0.5", "nan", "inf"])
def test_a_seed_that_is_no_whole_number_is_named(seed, tmp_path):
    folder = write_rows(tmp_path, [by_hand("0.5", 0, 0.5, 0.5), by_hand("0.5", seed, 0.5, 0.5)])
    with pytest.raises(ValueError, match=rf"rows.csv, line 3: seed is '{seed}', not a whole number"):
        read_sweep(folder)


def test_a_row_without_a_method_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"rows.csv, line 2: method is empty"):
        read_sweep(write_rows(tmp_path, [by_hand("0.5", 0, 0.5, 0.5) | {"method": ""}]))


def test_a_table_of_the_untrained_model_alone_is_refused(tmp_path):
    base = {"method": "base", "kind": "base", "status": "ok", "target": 0.5, "retained": 0.9}
    with pytest.raises(ValueError, match="contains no trained run, so there is nothing to report; run the sweep first"):
        read_sweep(write_rows(tmp_path, [base]))


@pytest.mark.parametrize(("lrs", "middle"), [((1e-3,), 1e-3), ((1e-3, 2e-3), 1e-3), ((1e-4, 1e-3, 2e-3), 1e-3)])
def test_the_middle_rate(lrs, middle, tmp_path):
    assert middle_rate(read_sweep(Made(**SMALL, lrs=lrs).write(tmp_path))) == middle


def test_equal_updates_take_the_reference_from_its_own_rate(tmp_path):
    sweep = read_sweep(Made(**SMALL).write(tmp_path))
    update = next(view for view in views(sweep) if view.key == "update")
    assert sweep.values("0.5", "retained", "update", 1e-3) == {}
    assert update.values("0.5", "retained") == sweep.values("0.5", "retained", "same", 1e-3)
    assert update.values("0.0", "retained") == sweep.values("0.0", "retained", "update", 1e-3)


def test_the_best_rate_of_a_seed_is_chosen_by_the_others(tmp_path):
    """Seed 0 does best at 2e-3, which the others do not choose for it."""
    targets = {(1e-3, 0): 0.5, (2e-3, 0): 0.9, (1e-3, 1): 0.8, (2e-3, 1): 0.1, (1e-3, 2): 0.8, (2e-3, 2): 0.7}
    rows = [by_hand("0.5", seed, target, 0.1 * seed + lr, lr=lr) for (lr, seed), target in targets.items()]
    best = views(read_sweep(write_rows(tmp_path, rows)))[-1]
    assert best.key == "best"
    assert best.rates["0.5"] == {0: 1e-3, 1: 2e-3, 2: 1e-3}
    assert best.values("0.5", "target") == {0: 0.5, 1: 0.1, 2: 0.8}


def test_a_rate_that_was_not_run_with_every_seed_is_no_candidate(tmp_path):
    rows = [by_hand("0.5", seed, 0.5 + lr, 0.5, lr=lr) for lr in (1e-3, 2e-3) for seed in range(3)]
    best = views(read_sweep(write_rows(tmp_path, rows[:-1])))[-1]
    assert set(best.rates["0.5"].values()) == {1e-3}


def test_tuned_rows_take_the_place_of_the_grids_best_rates(tmp_path):
    rows = [by_hand("0.5", seed, 0.5, 0.5, lr=lr) for lr in (1e-3, 2e-3) for seed in range(3)]
    rows += [by_hand("0.5", seed, 0.6, 0.5 + seed, lr=1.3e-3, comparison="tuned") for seed in range(3)]
    sweep = read_sweep(write_rows(tmp_path, rows))
    assert [view.key for view in views(sweep)] == ["same", "tuned"]
    assert views(sweep)[-1].values("0.5", "retained") == {0: 0.5, 1: 1.5, 2: 2.5}
    assert sweep.lrs == (1e-3, 2e-3)


@pytest.mark.parametrize("few", [{"seeds": 1}, {"lrs": (1e-3,)}])
def test_there_is_no_best_rate_of_one_seed_or_one_rate(few, tmp_path):
    sweep = read_sweep(Made(**{**SMALL, **few}, comparisons=("same",)).write(tmp_path))
    assert [view.key for view in views(sweep)] == ["same"]


def test_a_method_that_was_not_matched_yet_is_not_shown_among_the_matched(tmp_path):
    """A sweep that was stopped: the principal window was run at equal updates, the minor one not yet."""
    rows = [by_hand(method, 0, 0.5, 0.5) for method in ("0.0", "0.5", "1.0", "full")]
    rows.append(by_hand("0.0", 0, 0.5, 0.7, comparison="update"))
    sweep = read_sweep(write_rows(tmp_path, rows))
    view = next(view for view in views(sweep) if view.key == "update")
    shown = {method: view.values(method, "retained") for method in sweep.methods}
    assert shown == {"0.0": {0: 0.7}, "0.5": {0: 0.5}, "1.0": {}, "full": {0: 0.5}}
