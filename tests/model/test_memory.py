"""The peak memory of apply_pc, measured in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "apply_memory.py"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure peak memory")
@pytest.mark.parametrize("form", ["residual", "intact"])
def test_peak_is_at_most_three_of_the_largest_layer_in_float64(form):
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, str(SCRIPT), "square", "1024", form]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert 0.5 < float(done.stdout.split(",")[0]) <= 3
