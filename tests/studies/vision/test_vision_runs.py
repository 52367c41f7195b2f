"""The vision study's runs on a small model, its protocol and its page."""

import copy
import re
from dataclasses import replace

import pytest
import torch

from studies.frontier.analysis import Analysis
from studies.frontier.arms import Tuned
from studies.frontier.design import Run
from studies.frontier.page import PAGES
from studies.frontier.protocol import arms_table
from studies.frontier.rows import Rows
from studies.frontier.run import Runners, check, collect
from studies.frontier.training import train_run
from studies.vision import page as vision_page
from studies.vision.page import PROBES, sections
from studies.vision.protocol import ARMS, MAIN, PROTOCOL
from studies.vision.run import load
from tests.helpers.vision_study import design, images, study

RUN = Run("kinds", 8, "middle", 1e-3, 0)


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """All runs of the small design."""
    folder = tmp_path_factory.mktemp("vision")
    collect(study(folder / "work"), Rows(folder / "rows"), Runners(folder / "work"))
    return folder


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_starts_from_the_base_and_trains_only_the_blocks(arm, tmp_path):
    found = study(tmp_path)
    tuned = Tuned(copy.deepcopy(found.base), ARMS[arm], 4, 0, found.spectra)
    with torch.no_grad():
        assert torch.equal(tuned.model(images().new), found.base(images().new))
    assert {name.split(".")[2] for name in tuned.trained} == {"layer"}
    layers = {re.sub(r"\.(weight|lora_[AB])$", "", name) for name in tuned.trained}
    assert len(layers) == 2 * 6, "queries, keys, values, outputs and two layers of each block's perceptron"


def test_a_run_learns_and_moves(collected):
    lines = dict(Rows(collected / "rows").runs())[RUN]
    assert lines[0]["kl_photos"] == 0
    assert lines[0]["images"] == images().sha256()[:12]
    scales = [line["scale"] for line in lines if line["step"] == 8]
    assert scales == sorted({*design().scales, *design().finer})
    last = lines[-1]
    assert last["ce_new"] < lines[0]["ce_new"]
    for name in (*vision_page.FEATURES, *PROBES, "kl_photos", "error_new"):
        assert last[name] >= 0, name


def test_a_killed_run_gives_the_same_bits(collected, tmp_path):
    class Killed(BaseException):
        pass

    calls = iter(range(100))

    def kill():
        if next(calls) == 6:
            raise Killed

    rows = Rows(tmp_path / "rows")
    with pytest.raises(Killed):
        train_run(study(tmp_path), RUN, rows, kill)
    train_run(study(tmp_path), RUN, rows)
    name = f"runs/{RUN.key}.jsonl"
    assert (tmp_path / "rows" / name).read_bytes() == (collected / "rows" / name).read_bytes()


def test_rows_of_other_images_are_not_mixed(collected):
    other = study(collected / "work")
    labels = images().new_labels.roll(1)
    other.tasks = {"kinds": replace(images(), new_labels=labels)}
    with pytest.raises(ValueError, match="runs of another images, such as kinds-8-"):
        check(other, Rows(collected / "rows"))


def test_the_page_is_made_from_the_rows(collected):
    analysis = Analysis(design(), Rows(collected / "rows"))
    made = sections(analysis, PAGES.parents[1] / "some")
    assert "no verdict (collecting: 1 of 5 seeds)" in made["findings"]
    (chosen,) = analysis.tuned("kinds", 8, "lora", 1, "cka_photos").values()
    assert f"| {chosen:#.3g} |" in made["kept"]
    assert made["final"].count("plain LoRA") == len({run.rate for run in analysis.of("kinds", 8, "lora")})
    assert "emoji subcategories, 8 | plain LoRA" in made["features"]
    page = (PAGES / "vision.md").read_text()
    assert set(re.findall(r"<!-- study:(\w+) -->", page)) == set(made)


def test_without_rows_the_page_says_so(tmp_path):
    made = sections(Analysis(PROTOCOL.plan, Rows(tmp_path)), tmp_path)
    assert made["findings"] == made["kept"] == made["final"] == vision_page.NOT_RUN


def test_the_protocol_is_its_numbers():
    text = PROTOCOL.text.read_text()
    assert arms_table(ARMS) in text
    plan = PROTOCOL.plan
    for numbers in (plan.scales, plan.finer):
        *first, last = (f"{scale:g}".removeprefix("0") for scale in numbers)
        assert f"λ = {', '.join(first)}" in text
        assert last in text
    assert plan.metric == "kl_photos"
    assert {wave.arms for wave in plan.waves} == {MAIN, tuple(ARMS)[len(MAIN) :]}
    assert all(ARMS[run.arm].rate == run.rate for run in PROTOCOL.reference)


def test_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the vision study has one model, dinov2-small; leave --model"):
        load(tmp_path, "cpu")


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("IPCA_STUDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("IPCA_STUDY_PACKAGES", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"python -m studies\.vision\.packages"):
        load(None, "cpu")
