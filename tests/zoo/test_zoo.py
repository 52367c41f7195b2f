"""The zoo: a sample of architectures, the driver's rows, the table of refusals and the page."""

import os
import re
import time

import pytest

from tests.zoo import driver, page
from tests.zoo.models import ARCHITECTURES
from tests.zoo.refusals import AS_STOCK, REFUSALS, Refusal, faults, refusal
from tests.zoo.rows import Row, Run, read, source_hash, versions, write

pytest.importorskip("peft")
SAMPLE = {
    "llama": "linear",
    "gpt2": "linear",
    "mixtral": "experts",
    "bert_mlm": "named",
    "t5": "linear",
    "vit": "named",
    "resnet": "named",
    "whisper": "linear",
    "clip": "linear",
}
"""Architectures of different kinds, and the layers that are adapted."""
QUICK = r"\w+\.(intact\.(apply|start|gradients|save|load|merge|unload)|peft\.(apply|start|save|load|merge))"


@pytest.mark.parametrize(("name", "selection"), SAMPLE.items())
def test_an_architecture_of_the_sample(tmp_path, name, selection):
    from tests.zoo.case import Case
    from tests.zoo.checks import attempt, checks

    case = Case(name, ARCHITECTURES[name], tmp_path)
    quick = [(check, function) for check, function in checks(selection) if re.fullmatch(QUICK, check)]
    assert len(quick) == 12
    found = [attempt(case, check, function) for check, function in quick]
    assert [row for row in found if row.outcome != "ok"] == []


@pytest.mark.zoo
@pytest.mark.parametrize("name", list(ARCHITECTURES)[::45])
def test_what_was_right_is_right_today(name):
    """A sample; ``make zoo`` runs all, and so does .github/workflows/nightly.yml."""
    before = read(name)
    if before is None:
        pytest.skip(f"{name} has no rows; run: python -m tests.zoo {name}")
    _, rows = driver.run_one(name)
    right = {row.check for row in before[1] if row.outcome == "ok"}
    assert [row for row in faults(rows) if row.check in right | {"build"}] == []
    assert right <= {row.check for row in rows}


def test_rows_are_what_was_written(tmp_path):
    assert read("llama", tmp_path) is None
    run = Run("llama", "LlamaForCausalLM", 1.5, source_hash(), versions())
    rows = [Row("llama", "linear.intact.start", "ok"), Row("llama", "linear.intact.load", "wrong", "differs by 0.1 ‖")]
    write(run, rows, tmp_path)
    assert read("llama", tmp_path) == (run, rows)
    assert [path.name for path in tmp_path.iterdir()] == ["llama.jsonl"]


@pytest.mark.parametrize(
    ("source", "outcome", "options", "due"),
    [
        (None, None, {}, True),
        ("now", "ok", {"stale": True, "faulty": True}, False),
        ("old", "ok", {}, False),
        ("old", "ok", {"stale": True}, True),
        ("now", "error", {}, False),
        ("now", "error", {"faulty": True}, True),
    ],
)
def test_what_is_run_again(tmp_path, source, outcome, options, due):
    if source:
        run = Run("llama", "Llama", 1.0, source_hash() if source == "now" else source, versions())
        write(run, [Row("llama", "linear.intact.start", outcome)], tmp_path)
    assert driver.is_due("llama", tmp_path, **{"stale": False, "faulty": False, **options}) is due


def test_a_refusal_covers_its_message_and_nothing_else(monkeypatch):
    known = Refusal("blip|zamba.*", r"\w+\.cli\.init", "tied", "Tied weights.")
    monkeypatch.setattr("tests.zoo.refusals.REFUSALS", (known,))
    row = Row("zamba2", "linear.cli.init", "error", "ValueError: its weight is tied")
    others = [row._replace(architecture="a_blip"), row._replace(check="linear.cli.init2"), row._replace(text="no")]
    assert refusal(row, []) == "Tied weights."
    assert faults([row, *others]) == others


def test_what_stock_lora_cannot_do_either_is_no_fault():
    stock = Row("phimoe", "linear.lora.apply", "error", "TypeError: a")
    ours = Row("phimoe", "linear.peft.apply", "error", "TypeError: b")
    assert refusal(ours, [stock, ours]) == AS_STOCK
    assert faults([stock, ours]) == []
    for other in (ours._replace(text="KeyError: b"), ours._replace(check="linear.intact.apply")):
        assert faults([stock, other]) == [other]
    assert faults([stock._replace(outcome="ok"), ours]) == [ours]


def test_every_refusal_has_a_reason_and_names_architectures():
    for known in REFUSALS:
        assert known.reason.endswith(".")
        assert any(re.fullmatch(known.architectures, name) for name in ARCHITECTURES)
        assert re.compile(known.message)


def crash(name, folder):
    os.abort()


def sleep(name, folder):
    (folder / "current").write_text("linear.intact.start")
    time.sleep(600)


@pytest.mark.slow
def test_a_crash_and_a_time_limit_are_rows(tmp_path):
    driver.in_process(crash, "llama", tmp_path, 120)
    driver.in_process(sleep, "llama", tmp_path, 20)
    first, second = driver.recorded(tmp_path)
    assert (first.check, first.outcome) == ("build", "crash")
    assert first.text.startswith("the process ended with -6")
    assert (second.check, second.outcome) == ("linear.intact.start", "timeout")
    assert second.text.startswith("more than 20 s")


def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        driver.main(["lama"])
    assert stopped.value.code == 2
    assert "no architecture is called lama; there are llama," in capsys.readouterr().err


def test_the_page_is_up_to_date():
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run: python -m tests.zoo.page"


def test_every_check_has_one_column():
    found = {row.check for name in ARCHITECTURES for row in (read(name) or ((), ()))[1]}
    found = {check for check in found if ".lora." not in check and "." in check}
    assert found
    for check in found:
        assert sum(re.fullmatch(pattern, check) is not None for pattern, _ in page.COLUMNS.values()) == 1, check


def test_a_cell_says_yes_no_or_why(monkeypatch):
    monkeypatch.setattr("tests.zoo.refusals.REFUSALS", (Refusal(".*", ".*", "tied", "Tied weights."),))
    ok, wrong = Row("a", "linear.cli.init", "ok"), Row("a", "linear.cli.merge", "wrong", "differs")
    tied, idle = wrong._replace(text="tied"), wrong._replace(outcome="needs")
    pattern, letters = page.COLUMNS["`ipca`"][0], {}
    assert page.cell(pattern, [ok, Row("a", "build", "crash", "")], letters) == "no"
    assert [page.cell(pattern, rows, letters) for rows in ([ok], [ok, idle], [idle], [ok, wrong], [ok, tied])] == [
        "yes",
        "yes",
        "–",
        "no",
        "a",
    ]
    assert letters == {"Tied weights.": "a"}
