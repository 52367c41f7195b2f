"""The cache that bench/precompile.py makes has every kernel that a layer launches, by the keys of a launch."""

import os
import subprocess
import sys

import pytest

from bench.gpu import ROOT


def run(cache, *words):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), "IPCA_CACHE": str(cache.parent)}
    done = subprocess.run([sys.executable, "-m", *words], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Triton")
def test_a_launch_finds_what_was_compiled(tmp_path):
    """Of another rank it does not: that launch compiles."""
    cache = tmp_path / "cache"
    said = run(cache, "bench.precompile", "--out", str(cache), "--ranks", "16")
    assert " kernels for sm_90, triton " in said
    launched, compiled = map(int, run(cache, "tests.helpers.pretended_launch", "16").split())
    assert launched >= 4 * 5
    assert compiled == 0
    assert int(run(cache, "tests.helpers.pretended_launch", "64").split()[1]) > 0
