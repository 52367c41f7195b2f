"""``ipca tune``: the table that ``"auto"`` and the kernels choose by, measured on a device that is pretended."""

import json

import pytest
import torch

from ipca.cli.main import main
from ipca.cli.tune_command import model_shapes
from ipca.device import check_cases, self_check
from ipca.device import tune as measurement
from ipca.kernels import tables, tuning
from ipca.ops import backend
from tests.helpers.pretend_cuda import DEVICE, NAME, pretend_cuda, without_kernels

SHAPE = ("--shapes", "512x256", "--tokens", "300", "--quiet")
MS = {"triton": 1.0, "addmm": 3.0, "merged": 4.0, "reference": 5.0}


class Stopwatch:
    """Configurations and backends that were timed; the widest configuration is the fastest."""

    def __init__(self):
        self.kernels, self.backends = [], []

    def seconds(self, kernel, config, rerun):
        self.kernels.append(kernel)
        return -config.BLOCK_M

    def median_time(self, call, milliseconds):
        self.backends.append(backend.get_backend())
        return 2 * MS[self.backends[-1]]  # of two sets of inputs


@pytest.fixture
def timed(monkeypatch, tmp_path):
    pretend_cuda(monkeypatch, tmp_path)
    watch = Stopwatch()
    monkeypatch.setattr(measurement, "MOST_COPIES", 2)
    monkeypatch.setattr(measurement, "median_time", watch.median_time)
    monkeypatch.setattr(tuning, "seconds", watch.seconds)
    monkeypatch.setattr(tuning, "may_measure", lambda x: True)
    for name in ("measure_configs", "measure_backends"):
        monkeypatch.setattr(measurement, name, pretended(monkeypatch, getattr(measurement, name)))
    yield watch
    tables.forget()


def pretended(monkeypatch, measure):
    def run(*args, **options):
        with without_kernels(monkeypatch):
            return measure(*args, **options)

    return run


def tuned(capsys, *words):
    assert main(["tune", "--debug", *words]) == 0
    return capsys.readouterr()


def choice(M, form="intact", training=True):
    return backend.choose(
        "auto", backend.LinearShape(DEVICE, torch.bfloat16, M, 512, 256, 16, form == "intact", False, training)
    )


def test_auto_follows_what_was_measured(timed, capsys):
    self_check.store(DEVICE, dict.fromkeys(check_cases.DTYPES, ""))
    assert choice(300).backend == "addmm"
    record = json.loads(tuned(capsys, *SHAPE, "--json").out)
    assert record["device"] == NAME
    assert [(row["form"], row["mode"], row["auto"], row["ms"]) for row in record["rows"]] == [
        (form, mode, "triton", MS) for form in ("intact", "residual") for mode in ("training", "inference")
    ]
    found = choice(400)
    assert found.backend == "triton"
    assert "measured at (M, N, K, R) = (512, 512, 256, 16)" in found.reason
    table = tables.read(tables.cache_file(DEVICE))
    assert {row[0][0] for row in table["configs"]} == {"linear", "input_grad", "project", "products", "outer"}
    assert timed.backends == ["triton", "addmm", "merged", "reference"] * 4


def test_what_was_measured_is_not_measured_again_unless_forced(timed, capsys, monkeypatch):
    tuned(capsys, *SHAPE)
    counts = len(timed.kernels), len(timed.backends)
    monkeypatch.setattr(tuning, "_chosen", {})  # as in a new process
    tuned(capsys, *SHAPE, "--form", "intact")
    assert (len(timed.kernels), len(timed.backends)) == counts
    tuned(capsys, *SHAPE, "--tokens", "300", "2000")
    assert len(timed.backends) == 2 * counts[1]
    monkeypatch.setattr(tuning, "_chosen", {})
    tuned(capsys, *SHAPE, "--force")
    assert (len(timed.kernels), len(timed.backends)) == (3 * counts[0], 3 * counts[1])


def test_the_text_is_a_table_that_says_what_auto_takes(timed, capsys):
    with pytest.warns(RuntimeWarning, match="run `ipca doctor`"):
        out = tuned(capsys, *SHAPE[:-1], "--form", "residual").out.splitlines()
    assert " ".join(out[0].split()) == "weight layers tokens rank form mode triton addmm merged reference auto"
    assert " ".join(out[1].split()) == "512 × 256 1 300 16 residual training 1.000 3.000 4.000 5.000 addmm"
    assert out[3].startswith(f"milliseconds on {NAME}, kept in ")
    assert out[4].endswith("run `ipca doctor`")


def test_a_backend_that_fails_is_left_out_and_named(timed, capsys, monkeypatch):
    def failing(call, milliseconds):
        if backend.get_backend() == "merged":
            raise RuntimeError("CUDA out of memory")
        return 1.0

    monkeypatch.setattr(measurement, "median_time", failing)
    found = tuned(capsys, *SHAPE, "--json")
    assert all("merged" not in row["ms"] for row in json.loads(found.out)["rows"])
    assert "merged is left out at x (300, 256) by weight (512, 256)" in found.err
    assert "CUDA out of memory" in found.err


def test_dropout_is_measured_by_itself(timed, capsys):
    record = json.loads(tuned(capsys, *SHAPE, "--dropout", "0.1", "--json").out)
    assert all(set(row["ms"]) == {"triton", "addmm", "reference"} for row in record["rows"])
    assert {row[0][2] for row in tables.read(tables.cache_file(DEVICE))["backends"]} == {True}


def test_nothing_is_started_after_the_time(timed):
    cells = [measurement.Cell(300, 512, 256, 16)]
    assert not measurement.measure_configs(cells, DEVICE, seconds=-1, progress=False)
    assert not measurement.measure_backends(cells, DEVICE, seconds=-1, progress=False)
    assert set(timed.kernels) == {"project", "linear"}
    assert timed.backends == []


def test_the_shapes_of_a_model_are_those_of_its_linear_layers(llama, gpt2):
    assert model_shapes(llama, None, 4) == (
        {(32, 32): 4, (16, 32): 4, (48, 32): 4, (32, 48): 2},
        "bfloat16",
    )
    assert model_shapes(gpt2, None, 4) == ({(96, 32): 2, (32, 32): 2, (128, 32): 2, (32, 128): 2}, "float32")


def test_a_model_is_tuned(llama, timed, capsys):
    shapes = model_shapes(llama, None, 4)
    record = json.loads(tuned(capsys, str(llama), "--rank", "4", "--tokens", "64", "--quiet", "--json").out)
    assert {(layer["out"], layer["in"]): layer["count"] for layer in record["layers"]} == shapes[0]
    assert {row["dtype"] for row in record["rows"]} == {"bfloat16"}
    assert len(record["rows"]) == 4 * len(shapes[0])


@pytest.mark.usefixtures("timed")
def test_a_rank_that_no_weight_takes(capsys):
    assert main(["tune", "--shapes", "8x64"]) == 1
    assert "ipca: error: no weight takes rank 16; lower --rank." in capsys.readouterr().err


def test_without_a_gpu_there_is_nothing_to_choose(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["tune", "--shapes", "512x256"]) == 1
    assert "ipca: error: ipca tune needs a CUDA device, and torch sees none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give a model's folder or --shapes, one of them"),
        (["model", "--shapes", "2x2"], "give a model's folder or --shapes, one of them"),
        (["--shapes", "4096"], "must be the sizes of a weight such as 11008x4096, got '4096'"),
        (["--shapes", "2x2", "--dropout", "1"], "must be at least 0 and below 1, got '1'"),
    ],
)
def test_wrong_usage(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["tune", *words])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
