"""The benchmarks run, and compare what they say they compare."""

import json
import os
import re
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


def test_the_tokenize_benchmark_prints_ours_beside_the_library(tmp_path):
    script, out = ROOT / "benchmarks" / "data_tokenize.py", tmp_path / "results.json"
    arguments = ["--megabytes", "0.3", "--repeats", "2", "--workers", "1", "--out", str(out)]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    ours, theirs = (results["rows"][name] for name in ("pythia_jax", "encode_batch_fast"))
    assert results["ratio"] == pytest.approx(theirs["s"] / ours["s"])
    assert all(len(times) == 2 for times in results["times"].values())
    assert "| pythia_jax |" in done.stdout and "1 threads" in done.stdout


def script_output(name, *arguments):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / name, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_order_benchmark_prints_time_and_memory_beside_the_shuffles():
    printed = script_output("data_order.py", "--documents", "20000", "--repeats", "1")
    for name in ("NumPy's two shuffles", "build_sample_order", "blending_indices, 3 datasets"):
        assert f"| {name} |" in printed
    assert "times as long as the shuffles alone (at most 2)" in printed
    assert "The whole Pile, 10530.0 times as many documents" in printed


def test_the_loading_benchmark_prints_ours_beside_torch_and_raw_copies():
    arguments = ["--gigabytes", "0.01", "--batch-size", "16", "--batches", "2", "--repeats", "1"]
    printed = script_output("data_loading.py", *arguments)
    assert "| pythia_jax, read_ahead |" in printed and "| torch DataLoader, 2 workers |" in printed
    assert "times as many rows as torch's best (aim: 5)" in printed


@pytest.mark.slow
def test_the_order_of_a_tenth_of_the_pile_costs_at_most_twice_its_shuffles():
    printed = script_output("data_order.py")
    match = re.search(r"takes ([\d.]+) times as long .* its process ([\d.]+) times", printed)
    assert match, printed
    times, memory = map(float, match.groups())
    assert times <= 2 and memory <= 3
