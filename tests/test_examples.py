import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_quickstart_runs_and_its_claims_hold():
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    said = dict(line.split(":", 1) for line in lines if ":" in line)
    assert said["before training it is the base"].strip() == "True"
    assert said["loaded"].strip() == "True"
    assert said["disabled it is the base"].strip() == "True"
    assert float(said["new task"].split()[-1]) < 0.1  # the variance of the new task's targets is above 0.1
    assert float(said["merged"].split()[-1]) < 1e-4
