"""Which configuration a shape gets, what is measured when, and the tables on disk."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from bench.kernel_cases import LIMITS
from ipca.kernels import tables, tuning
from ipca.kernels.configs import CONFIGS, Config, Limits, fitting, shared_bytes, untuned
from ipca.kernels.launch import compile_only, grid_of
from tests.helpers.pretend_cuda import pretend_cuda

H100 = Limits(232_448, 0)
CUDA = torch.device("cuda", 0)
EASY = {"dropout": False, "tma": True}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A device that answers what the tuner asks, with a cache of its own and no shipped table."""
    pretend_cuda(monkeypatch, tmp_path)
    yield tmp_path
    tables.forget()


class Rows:
    """Stands for a CUDA tensor: the tuner looks at nothing else."""

    is_cuda, device = True, CUDA

    def __init__(self, M, itemsize=2):
        self.shape, self.itemsize = (M, 4096), itemsize

    def element_size(self):
        return self.itemsize


def choose(M, kernel="linear", rerun=lambda: None, **hard):
    return tuning.choose(kernel, Rows(M), N=4096, K=4096, R=16, **{**EASY, **hard}, rerun=rerun)


def test_there_are_at_most_eight_configurations_a_kernel():
    assert all(1 <= len(every) <= 8 and len(set(every)) == len(every) for every in CONFIGS.values())


@pytest.mark.parametrize(("kernel", "kind"), CONFIGS, ids=str)
@pytest.mark.parametrize("R", [1, 16, 128, 2000])
def test_what_does_not_fit_shared_memory_is_left_out(kernel, kind, R):
    for shared in (60_000, 166_912, 232_448):
        fit = fitting(kernel, kind, R, Limits(shared, 0), **EASY)
        assert fit
        if len(fit) > 1:
            assert all(shared_bytes(kernel, config, kind, R) <= shared for config in fit)
    assert set(fit) <= set(CONFIGS[kernel, kind])


def test_heavy_epilogues_and_tensor_memory_leave_wide_tiles_out():
    def widest(limits, **hard):
        return max(c.BLOCK_M * c.BLOCK_N for c in fitting("linear", "16-bit", 16, limits, **{**EASY, **hard}))

    assert widest(H100) == widest(H100, dropout=True) == 128 * 256
    assert widest(H100, dropout=True, tma=False) == 128 * 128
    assert widest(Limits(232_448, 512)) == widest(Limits(232_448, 512), dropout=True) == 128 * 256
    assert widest(Limits(232_448, 256), dropout=True) == 128 * 128


@pytest.mark.parametrize(
    ("M", "bucket"), [(1, 16), (16, 16), (17, 32), (256, 256), (257, 512), (8192, 8192), (10**6, 65536)]
)
def test_buckets(M, bucket):
    assert tuning.bucket(M) == bucket


def test_an_unmeasured_shape_takes_the_first_configuration_that_fills_the_device():
    fit = fitting("linear", "16-bit", 16, H100, **EASY)
    assert untuned("linear", fit, 8192, 4096, 4096, 132) == fit[0]
    few = untuned("linear", fit, 64, 4096, 4096, 132)
    assert few.BLOCK_M * few.BLOCK_N < fit[0].BLOCK_M * fit[0].BLOCK_N
    assert untuned("linear", fit, 128 * 8, 256 * 15, 4096, 132) == fit[0], "120 tiles nearly fill 132 multiprocessors"
    for M in (16, 1024, 8192):
        assert untuned("outer", CONFIGS["outer", "16-bit"], M, 16, 4096, 132) == CONFIGS["outer", "16-bit"][0]
    assert untuned("project", CONFIGS["project", "16-bit"], 8192, 128, 4096, 132).BLOCK_M >= 64


def test_nothing_is_timed_unless_autotuning_is_on(gpu):
    calls = []
    assert choose(8192, rerun=lambda: calls.append(1)) == CONFIGS["linear", "16-bit"][0]
    assert calls == []
    assert not (gpu / "cache").exists()


def test_a_shape_is_timed_once_and_kept_on_disk(gpu, monkeypatch):
    monkeypatch.setenv("IPCA_AUTOTUNE", "1")
    monkeypatch.setattr(torch._guards, "detect_fake_mode", lambda x: None)
    timed = []

    def seconds(kernel, config, rerun):
        timed.append(config)
        return {CONFIGS["linear", "16-bit"][3]: 1.0}.get(config, 2.0)

    monkeypatch.setattr(tuning, "seconds", seconds)
    best = CONFIGS["linear", "16-bit"][3]
    assert [choose(M) for M in (8192, 8000, 4097, 8192)] == [best] * 4
    candidates = fitting("linear", "16-bit", 16, H100, **EASY)
    assert timed == list(candidates)
    monkeypatch.setattr(tuning, "_chosen", {})  # as in a new process
    assert choose(8192) == best
    assert len(timed) == len(candidates)
    assert choose(2000) == best
    assert len(timed) == 2 * len(candidates)
    (file,) = (gpu / "cache").iterdir()
    assert file.name == "test-gpu-80gb.json"
    assert len(json.loads(file.read_text())["configs"]) == 2


def test_the_nearest_row_of_the_closest_table_is_taken(gpu):
    own, other, older = (CONFIGS["linear", "16-bit"][i] for i in (2, 3, 4))
    of = ["linear", "16-bit", False]
    (gpu / "shipped").mkdir()

    def ship(name, device, capability, config, shape=(8192, 4096, 4096, 16)):
        table = {"device": device, "capability": capability, "configs": [[of, list(shape), list(config)]]}
        (gpu / "shipped" / f"{name}.json").write_text(json.dumps(table))
        tables.forget()

    ship("older", "Old GPU", [8, 0], older)
    assert choose(8192) == CONFIGS["linear", "16-bit"][0]  # another architecture says nothing
    tuning._chosen.clear()
    ship("sibling", "Test GPU 140GB", [9, 0], other)
    assert choose(300) == other
    tuning._chosen.clear()
    ship("same", "Test GPU 80GB", [9, 0], own)
    assert choose(8192) == own
    tuning._chosen.clear()
    tables.add_rows(tables.cache_file(CUDA), CUDA, configs=[[of, [256, 4096, 4096, 16], list(other)]])
    assert choose(256) == other  # measured on this very machine
    assert choose(8192) == own  # but far from there, the shipped row of the same device is closer


def test_a_row_too_far_away_is_no_measurement(gpu):
    config = CONFIGS["linear", "16-bit"][2]
    row = [["linear", "16-bit", False], [8192, 4096, 4096, 16], list(config)]
    tables.add_rows(tables.cache_file(CUDA), CUDA, configs=[row])
    assert tables.octaves([8192, 4096], [512, 4096]) == tables.FURTHEST
    for M, found in ((512, config), (256, untuned("linear", CONFIGS["linear", "16-bit"], 256, 4096, 4096, 132))):
        tuning._chosen.clear()
        assert choose(M) == found
        assert (tables.nearest("configs", ("linear", "16-bit", False), (M, 4096, 4096, 16), CUDA) is None) == (M == 256)


def test_forward_and_input_gradient_have_rows_of_their_own(gpu):
    for kernel, i in (("linear", 2), ("input_grad", 4)):
        row = [[kernel, "16-bit", False], [8192, 4096, 4096, 16], list(CONFIGS[kernel, "16-bit"][i])]
        tables.add_rows(tables.cache_file(CUDA), CUDA, configs=[row])
    assert [choose(8192, kernel) for kernel in ("linear", "input_grad")] == [
        CONFIGS["linear", "16-bit"][i] for i in (2, 4)
    ]


@pytest.mark.parametrize(
    ("arch", "shared", "columns"),
    [(80, 163, 0), (86, 99, 0), (89, 99, 0), (90, 227, 0), (100, 227, 512), (103, 227, 512), (120, 99, 0)],
)
def test_the_limits_of_a_device(monkeypatch, arch, shared, columns):
    from triton.runtime import driver

    found = SimpleNamespace(utils=SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": shared << 10}))
    monkeypatch.setattr(driver, "_active", found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: divmod(arch, 10))
    assert tuning.limits(CUDA) == Limits(shared << 10, columns) == LIMITS[arch]


@pytest.mark.parametrize("arch", [86, 89, 120])
@pytest.mark.parametrize("tma", [False, True])
def test_what_a_card_with_99_kib_is_offered(arch, tma):
    for (kernel, kind), every in CONFIGS.items():
        fit = fitting(kernel, kind, 16, LIMITS[arch], tma=tma)
        assert all(shared_bytes(kernel, config, kind, 16) <= 99 << 10 for config in fit)
        assert fit[-1] == every[-1]
    wide = CONFIGS["linear", "16-bit"][0]
    assert wide not in fitting("linear", "16-bit", 16, LIMITS[arch], tma=tma)


def test_a_row_that_does_not_fit_is_not_taken(gpu):
    wide = CONFIGS["linear", "16-bit"][0]
    of = ["linear", "16-bit", True]
    tables.add_rows(tables.cache_file(CUDA), CUDA, configs=[[of, [8192, 4096, 4096, 16], list(wide)]])
    chosen = choose(8192, dropout=True, tma=False)
    assert chosen != wide
    assert chosen in CONFIGS["linear", "16-bit"]


def test_asking_what_would_run_leaves_no_trace(gpu):
    assert choose(8192, rerun=None) == CONFIGS["linear", "16-bit"][0]
    assert tuning._chosen == {}


def test_a_symbolic_number_of_tokens_counts_as_many():
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    M = ShapeEnv().create_unbacked_symint()
    assert tuning.bucket(M) == tuning.UNKNOWN_M


@pytest.mark.parametrize("text", ["[1, 2", '{"device": "GPU", "capability": [9, 0], "backends": [[1]]}'])
def test_a_broken_table_is_named(gpu, text):
    path = tables.cache_file(CUDA)
    path.parent.mkdir()
    path.write_text(text)
    tables.forget()
    with pytest.raises(ValueError, match=r"test-gpu-80gb\.json is not a tuning table .* delete it to measure anew"):
        choose(8192)


def test_many_writers_leave_a_whole_table(gpu):
    path = tables.cache_file(CUDA)

    def add(i):
        tables.add_rows(path, CUDA, configs=[[["linear", "16-bit", False], [i, i, i, i], list(Config(1, 1, 1, 1, 1))]])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(64)))
    assert len(tables.read(path)["configs"]) >= 1
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    (path.parent / "plain").touch()
    assert path.stat().st_mode == (path.parent / "plain").stat().st_mode  # for all who share the folder


def test_a_row_measured_again_replaces_the_first(gpu):
    path, of = tables.cache_file(CUDA), ["linear", "16-bit", False]
    for config in CONFIGS["linear", "16-bit"][:2]:
        tables.add_rows(path, CUDA, configs=[[of, [1, 1, 1, 1], list(config)]])
    assert tables.read(path)["configs"] == [[of, [1, 1, 1, 1], list(CONFIGS["linear", "16-bit"][1])]]


def test_shipped_tables_are_sound():
    for path in tables.SHIPPED.glob("*.json"):
        table = tables.read(path)
        assert all(Config(*row[2]) in CONFIGS[tuple(row[0][:2])] for row in table["configs"])
        assert all(ms > 0 for row in table["backends"] for ms in row[2].values())


def test_a_shape_measured_without_dropout_serves_with_it(gpu):
    config = CONFIGS["linear", "16-bit"][2]
    row = [["linear", "16-bit", False], [8192, 4096, 4096, 16], list(config)]
    tables.add_rows(tables.cache_file(CUDA), CUDA, configs=[row])
    assert choose(8192, dropout=True) == config


def test_a_launch_can_compile_and_run_nothing():
    done = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: done.append(("run", grid, args))

        def warmup(self, *args, grid, **options):
            done.append(("compiled", grid, args))

    with compile_only():
        grid_of(Kernel(), (2,))(1)
    grid_of(Kernel(), (2,))(1)
    assert done == [("compiled", (2,), (1,)), ("run", (2,), (1,))]


def test_what_cannot_be_measured_now_is_measured_later(gpu, monkeypatch):
    """A first call inside a trace or a graph capture leaves no answer behind."""
    monkeypatch.setenv("IPCA_AUTOTUNE", "1")
    monkeypatch.setattr(torch._guards, "detect_fake_mode", lambda x: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(tuning, "seconds", lambda kernel, config, rerun: -config.BLOCK_K)
    assert choose(8192) == CONFIGS["linear", "16-bit"][0]
    assert tuning._chosen == {}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    choose(8192)
    assert len(tuning._chosen) == 1


@pytest.mark.parametrize("legacy", [True, False])
def test_how_float32_is_multiplied_follows_pytorch(legacy):
    code = (
        "import torch; from ipca.kernels import configs; x = torch.randn(2, 2);"
        "seen = lambda: print(configs.arithmetic(x), configs.precision(x), configs.arithmetic(x.half()));"
        + ("seen(); torch.set_float32_matmul_precision('high');" if legacy else "")
        + ("" if legacy else "seen(); torch.backends.cuda.matmul.fp32_precision = 'tf32';")
        + "seen()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["float32 ieee 16-bit", "tf32 tf32 16-bit"]
