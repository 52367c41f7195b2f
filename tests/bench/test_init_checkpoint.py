"""The bench of ``ipca init``, on a checkpoint of small layers."""

import subprocess
import sys

import pytest

from bench.rows import read_rows

SMALL = """
import sys
from bench import init_checkpoint as bench
bench.HIDDEN, bench.INTERMEDIATE, bench.VOCABULARY, bench.HEADS = 32, 48, 50, 4
bench.SHAPES = {name: tuple(48 if n > 4096 else 32 for n in shape) for name, shape in bench.SHAPES.items()}
sys.exit(bench.main())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="pins processes to cores")
def test_it_measures_one_process_two_and_one_that_was_killed(tmp_path):
    options = ["--rank", "4", "--out", str(tmp_path / "rows.csv")]
    done = subprocess.run([sys.executable, "-c", SMALL, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "rows.csv")
    assert [(row["form"], row["op"], row["processes"]) for row in rows] == [
        ("intact", "init", "1"),
        ("intact", "init", "2"),
        ("intact", "killed and resumed", "1"),
        ("residual", "init", "1"),
    ]
    assert {(row["layers"], row["matrices"], row["rank"]) for row in rows} == {("2", "14", "4")}
    assert [row["finished_before"] == "0" for row in rows] == [True, True, False, True]
    assert all(float(row["peak_mib"]) > 50 and float(row["cpu_s"]) > 0 for row in rows)
