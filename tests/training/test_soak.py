"""The soak benchmark, small: a run killed at random moments equals one left alone."""

import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_run_killed_three_times_equals_one_left_alone(processes: str) -> None:
    command = [sys.executable, SOAK, "--kills", "3", "--processes", processes]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    header, _, row = done.stdout.strip().splitlines()
    told = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    assert told["result |"] == "equal |" and told["kills"] == "3"
