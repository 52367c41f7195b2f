"""Layer-by-layer decomposition: the files of save_adapter, with one layer in memory."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ipca
from ipca.io.checkpoint import WHOLE
from ipca.model import AdapterSettings
from ipca.model.apply import adapt
from ipca.offline.source import ModelSource
from ipca.offline.work_folder import WorkFolder
from ipca.svd.cache import SpectralCache
from tests.helpers.model_folders import contents
from tests.helpers.models import Net, Plain
from tests.helpers.offline_runs import Run

FORMS = ("intact", "residual")


OPTIONS = {
    "plain": {},
    "alpha": {"alpha": 5.0},
    "patterns": {"rank_pattern": {"a": 4}, "window_pattern": {"b": "energy=0.5"}, "alpha_pattern": {"a": 7.5}},
    "dtype": {"adapter_dtype": "float64", "dropout": 0.1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_adapter_is_the_one_of_the_whole_model(tmp_path, dtype, options):
    base = Plain().to(dtype)
    run = Run(tmp_path, base, AdapterSettings(rank=3, form="intact", **options))
    run()
    model = adapt(base, run.settings, progress=False)
    ipca.save_adapter(model, tmp_path / "whole")
    assert contents(run.out) == contents(tmp_path / "whole")
    assert len(os.listdir(run.out)) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_residual_form_is_the_one_of_the_whole_model(tmp_path, dtype):
    base = Plain().to(dtype)
    run = Run(tmp_path, base, AdapterSettings(rank=3, alpha=2.0, form="residual"))
    run()
    ipca.export(adapt(base, run.settings, progress=False), tmp_path / "whole", format="residual")
    assert sorted(os.listdir(run.out)) == ["adapter", "base"]
    mine, whole = contents(run.out / "adapter"), contents(tmp_path / "whole" / "adapter")
    assert mine.pop("adapter_config.json") != whole.pop("adapter_config.json")  # each names its own base
    assert mine == whole
    ours, theirs = load_file(run.out / "base" / WHOLE), load_file(tmp_path / "whole" / "base" / WHOLE)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) and ours[name].dtype == dtype for name, value in theirs.items())


@pytest.mark.parametrize("form", FORMS)
def test_a_model_in_memory_gives_the_same_files(tmp_path, form):
    run = Run(tmp_path, Plain(), AdapterSettings(rank=3, form=form))
    run()
    streamed = contents(run.out)
    other = Run(tmp_path, run.base, run.settings)
    other.out = tmp_path / "second"
    other(source=ModelSource(copy.deepcopy(run.base)))
    whole = contents(other.out)
    for name in ("adapter/adapter_config.json", "base/model.safetensors") * (form == "residual"):
        del streamed[name], whole[name]
    assert whole == streamed


def test_the_adapter_loads_onto_its_base_alone(run):
    run()
    other = Net()
    with pytest.raises(ValueError, match="this is not the base weight the adapter was made on"):
        ipca.load_adapter(other, run.out)
    model = ipca.load_adapter(copy.deepcopy(run.base), run.out)
    x = torch.randn(4, 20)
    assert torch.equal(model.b(model.a(x)), run.base.b(run.base.a(x)))


def test_stored_floats_are_cast_as_the_model_is(tmp_path):
    run = Run(tmp_path, Plain(), AdapterSettings(rank=3, form="intact"))
    run.base.bfloat16()
    run()
    ipca.save_adapter(adapt(run.base, run.settings, progress=False), tmp_path / "whole")
    assert contents(run.out) == contents(tmp_path / "whole")


def test_the_cache_serves_a_second_job(tmp_path, run):
    cache = SpectralCache(tmp_path / "cache")
    run(cache=cache)
    assert (cache.hits, len(cache.entries())) == (0, 2)
    first = contents(run.out)
    run.out = tmp_path / "again"
    run(cache=cache)
    assert cache.hits == 2
    assert contents(run.out) == first


def test_an_error_names_the_layer(tmp_path):
    base = Plain()
    with torch.no_grad():
        base.b.weight[1, 2] = float("nan")
    run = Run(tmp_path, base, AdapterSettings(rank=3, form="intact"))
    with pytest.raises(ValueError, match=r"^b: the tensor holds NaN or Inf"):
        run()
    assert WorkFolder(run.out).count() == 1


def test_a_tensor_of_another_shape_is_refused(run):
    save_file({**run.base.state_dict(), "b.weight": torch.ones(2, 2)}, run.folder / WHOLE)
    with pytest.raises(ValueError, match=r"b\.weight has shape \(2, 2\), but b of the model has \(20, 12\)"):
        run.source()


MEMORY = """
import sys, torch
from pathlib import Path
from torch import nn
from ipca.model import AdapterSettings
from tests.helpers.offline_runs import Run

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

folder, form, d = Path(sys.argv[1]), sys.argv[2], 768

def peak(layers):
    place = folder / str(layers)
    place.mkdir()
    model = nn.Sequential(*[nn.Linear(d, d, bias=False) for _ in range(layers)]).bfloat16()
    run = Run(place, model, AdapterSettings(rank=16, form=form))
    run.base = run.base.to("meta")
    del model
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = status("VmRSS")
    run()
    return (status("VmHWM") - before) / (8 * d * d)

peak(2)  # libraries and their buffers
print(peak(1), peak(40))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure peak memory")
@pytest.mark.parametrize("form", FORMS)
def test_peak_memory_does_not_grow_with_the_model(tmp_path, form):
    """In units of a layer in float64; 40 layers in bfloat16 take 10 of them, what the allocator keeps is below 1."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "PYTHONPATH": path}
    command = [sys.executable, "-c", MEMORY, str(tmp_path), form]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    one, many = map(float, done.stdout.split())
    assert one > 0.5
    assert many <= one + 2.5
