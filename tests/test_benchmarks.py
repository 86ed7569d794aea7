"""The benchmarks run, and compare what they say they compare."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "train_step.py"
train_step = SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        # The script's folder comes first on its path; ours lies beside it, installed or not.
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_the_train_step_benchmark_prints_ours_beside_torch(tmp_path):
    out = tmp_path / "results.json"
    done = run("--shapes", "14m:1x16", "--repeats", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    measured = results["measured"]["14m:1x16"]
    assert set(measured) == set(train_step.WORKERS)
    for name, row in measured.items():
        assert f"| 14m:1x16 | {name} |" in done.stdout
        assert row["wall s"] > 0 and row["CPU s"] > 0 and row["peak MiB"] > 100
        # One and the same function, freshly initialised: about log(50304) = 10.8 nats.
        assert 9 < row["last loss"] < 13, name


def test_ratios_are_taken_against_torchs_better_figure():
    figures = {"pythia_jax": (600, 300), "torch": (400, 1000), "torch, keeping memory": (500, 1200)}
    results = {n: {"tokens/s": t, "peak MiB": m} for n, (t, m) in figures.items()}
    assert train_step.ratios(results) == {"tokens/s": 600 / 500, "peak MiB": 300 / 1000}


@pytest.mark.parametrize("shape", ["70m", "70m:8", "70m:8x512x2", "70m:ax512"])
def test_a_malformed_shape_is_refused_before_anything_runs(shape):
    done = run("--shapes", shape)
    assert done.returncode == 2 and "size:BATCHxSEQ" in done.stderr
