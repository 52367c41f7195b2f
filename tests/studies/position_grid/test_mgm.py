"""The position-grid study's model and tasks: MGM's order of genera, the split by people, a small GPT-2 in every arm."""

import copy
import hashlib
import json
import zipfile
from dataclasses import replace

import pytest
import torch

from studies.frontier.arms import Tuned
from studies.frontier.design import Run
from studies.frontier.rows import Rows
from studies.frontier.texts import Texts
from studies.frontier.training import Study, train_run
from studies.position_grid import mgm
from studies.position_grid.mgm import END, PADDING, START, Genus
from studies.position_grid.protocol import ARMS, PLAN, PROTOCOL

GENERA = {"Common": Genus(4, 0.5, 0.1), "Rare": Genus(5, 0.01, 0.01), "Middling": Genus(6, 0.1, 0.1)}


def test_a_sentence_lists_genera_by_what_is_unusual_about_their_share():
    counts = {"Common": 60.0, "Rare": 10.0, "Middling": 30.0, "Unknown": 900.0}
    assert mgm.sentence(counts, GENERA) == [START, 5, 6, 4, END], "(.10 − .01) / .01, (.3 − .1) / .1, (.6 − .5) / .1"
    assert mgm.sentence({"Common": 1.0, "Rare": 0.0}, GENERA) == [START, 4, END], "absent genera are left out"


def test_reversed_sentences_keep_start_end_and_padding():
    ids = torch.tensor([[START, 7, 8, 9, END, PADDING], [START, 5, 6, 7, 8, 9]])
    expected = [[START, 9, 8, 7, END, PADDING], [START, 9, 8, 7, 6, 5]]
    assert mgm.reverse(ids).tolist() == expected
    assert torch.equal(mgm.reverse(mgm.reverse(ids)), ids)


def test_sentences_are_padded_to_the_longest_or_cut():
    assert mgm.pad([[2, 4, 3], [2, 3]]).tolist() == [[2, 4, 3], [2, 3, PADDING]]
    assert mgm.pad([[2, *range(4, 100), 3]]).shape == (1, mgm.LENGTH)


@pytest.fixture
def counts(monkeypatch):
    """Ten people, two samples each; person ``k`` has the common genus and, for even ``k``, the rare one."""
    samples = [f"TS{k}{end}" for k in range(1, 11) for end in ("", ".2")]
    even = [str(10 * (1 - k % 2)) for k in range(1, 11) for _ in range(2)]
    table = "\n".join(",".join(line) for line in (["Taxa", *samples], ["Common"] + ["9"] * 20, ["Rare", *even]))
    monkeypatch.setattr(mgm, "package_files", lambda url, sha256, names: iter([table.encode()]))


def test_no_person_is_trained_on_and_held_out(counts):
    train, held_out = mgm.twin_sentences(GENERA)
    assert (len(train), len(held_out)) == (16, 4)
    assert held_out.tolist() == [[START, 4, END, PADDING]] * 2 + [[START, 5, 4, END]] * 2, "people 9 and 10"


def test_the_other_tasks_held_out_sentences_are_kept_text(counts):
    samples = torch.randint(4, 7, (mgm.SAMPLES + mgm.HELD_OUT + mgm.TRAIN, mgm.LENGTH))
    found = mgm.task_texts(GENERA, samples)
    assert set(found) == set(PLAN.tasks)
    assert torch.equal(found["twins"].kept["other"], found["reversed"].new[: mgm.OTHER])
    assert torch.equal(found["reversed"].kept["other"], found["twins"].new[: mgm.OTHER])
    assert torch.equal(found["reversed"].train, mgm.reverse(samples[-mgm.TRAIN :]))
    assert all(torch.equal(texts.kept["samples"], samples[: mgm.SAMPLES]) for texts in found.values())
    assert all(set(texts.kept) == set(PLAN.kept) for texts in found.values())


def test_unexpected_names_of_samples_are_named(monkeypatch):
    monkeypatch.setattr(mgm, "package_files", lambda url, sha256, names: iter([b"Taxa,XY1\nCommon,3\n"]))
    with pytest.raises(ValueError, match="a sample is called XY1; expected TS and a number"):
        mgm.twin_sentences(GENERA)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel like MGM's with a small model of dropout .1."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    settings = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 7, "n_positions": 64, "attn_pdrop": 0.1}
    settings |= {"bos_token_id": START, "eos_token_id": END, "pad_token_id": PADDING, "initializer_range": 0.2}
    model = GPT2LMHeadModel(GPT2Config(**settings))
    torch.save(model.state_dict(), tmp_path / "model.bin")
    weights = (tmp_path / "model.bin").read_bytes()
    table = "#SampleID,mean,std\n" + "".join(f"g__{n},{g.mean},{g.std}\n" for n, g in GENERA.items())
    path = tmp_path / mgm.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mgm/resources/general_model/pytorch_model.bin", weights)
        archive.writestr("mgm/resources/general_model/config.json", json.dumps(settings))
        archive.writestr("mgm/resources/phylogeny.csv", table)
    monkeypatch.setenv("IPCA_STUDY_MGM", str(path))
    monkeypatch.setattr(mgm, "_WEIGHTS_SHA256", hashlib.sha256(weights).hexdigest())
    return path


def test_the_model_comes_out_of_its_wheel(wheel, monkeypatch):
    model = mgm.load_model()
    assert model.config.attn_pdrop == 0.0
    assert model.config.use_cache is False
    assert mgm.load_genera() == GENERA
    monkeypatch.setattr(mgm, "_WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="does not hold MGM's weights as published"):
        mgm.load_model()
    wheel.unlink()
    with pytest.raises(FileNotFoundError, match=r"run: pip download --no-deps -d .* microformer-mgm==0\.5\.8"):
        mgm.load_model()


def sentences(count, seed):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 10, (count,), generator=draw).tolist()
    return mgm.pad([[START, *torch.randint(4, 7, (n,), generator=draw).tolist(), END] for n in lengths])


EXTENDED = PROTOCOL.extended()
_FIRST = ("0.5", "lora", "random", "frozen-A", "rslora", "full")


@pytest.mark.parametrize("arm", [*_FIRST, *(name for name in EXTENDED.arms if name not in ARMS)])
def test_a_run_of_an_arm_on_sentences_of_unequal_length(arm, wheel, tmp_path):
    texts = Texts(sentences(20, 1), sentences(6, 2), {"samples": sentences(6, 3), "other": sentences(4, 4)}, PADDING)
    base = mgm.load_model()
    design, made = replace(EXTENDED, rank=4), EXTENDED.arms[arm]
    study = Study(design, base, {"twins": texts}, tmp_path, {"protocol": "p", "model": "m"}, progress=False)
    inputs = study.inputs("twins", made.inputs) if made.inputs else None
    tuned = Tuned(copy.deepcopy(base), made, 4, 0, study.spectra, inputs)
    ids = texts.new
    assert torch.equal(tuned.model(input_ids=ids).logits, base(input_ids=ids).logits), "the start is the base"
    run, rows = Run("twins", 8, arm, made.rate, 0), Rows(tmp_path / "rows")
    train_run(study, run, rows)
    lines = dict(rows.runs())[run]
    assert {line["status"] for line in lines} == {"ok"}
    assert lines[0]["kl_samples"] == 0
    assert lines[-1]["ce_new"] < lines[0]["ce_new"], "it learns"
    assert 0 < lines[-1]["update"] < 1
    train_run(study, replace(run, seed=1), rows)
    assert rows.items(replace(run, seed=1)) == {}, "kept of the first seed"
    items = rows.items(run)["kl_samples"]
    assert torch.equal(items.isnan(), ~texts.scored(texts.kept["samples"])), "padding has no value"
    assert items.float().nanmean().item() == pytest.approx(lines[-1]["kl_samples"], rel=1e-2)
