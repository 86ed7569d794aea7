"""The benchmarks run, and compare what they say they compare."""

import json
import math
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
train_step_gpu = SimpleNamespace(**runpy.run_path(str(SCRIPT.with_name("train_step_gpu.py"))))


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        # The script's folder comes first on its path; ours lies beside it, installed or not.
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_gpu_side_runs_on_a_cpu_and_prints_its_table(tmp_path):
    out = tmp_path / "results.json"
    small = ["--batch", "2", "--seq", "64", "--dtype", "float32", "--repeats", "1", "--rounds", "2"]
    done = run("--platform", "cpu", "--sizes", "14m", *small, "--out", str(out))
    assert done.returncode == 0, done.stderr
    measured = json.loads(out.read_text())["measured"]["14m"]
    for name in ("pythia_jax", "torch"):
        row = measured[name]
        assert f"| 14m | {name} | {row['setting']} | 2 |" in done.stdout
        assert len(row["all step s"]) == 2 and row["peak GiB"] > 0.1
        assert 9 < row["loss"] < 13  # one and the same function, as above
    assert "| unknown |" in done.stdout, "the peak of a CPU is not known, so no MFU"
    for setting in ("none", "dots", "full"):
        assert f"14m pythia_jax {setting}, 2 rows: " in done.stderr


def card_of(fits, gain=1.9):
    """A made-up device that holds so many rows, and what was tried on it."""
    tried = []

    def attempt(rows):
        tried.append(rows)
        return {"batch": rows, "tokens/s": rows ** math.log2(gain)} if rows <= fits else None

    return attempt, tried


@pytest.mark.parametrize(
    ("fits", "gain", "tried", "kept"),
    [
        (40, 1.9, [8, 16, 32, 64], [8, 16, 32]),
        (3, 1.9, [8, 4, 2], [2]),
        (0, 1.9, [8, 4, 2, 1], []),
        (10**9, 1.005, [8, 16], [8, 16]),
        (10**9, 1.9, [8, 16, 32, 64, 128, 256, 512, 1024], [8, 16, 32, 64, 128, 256, 512, 1024]),
    ],
)
def test_rows_are_doubled_until_memory_is_full_or_nothing_is_gained(fits, gain, tried, kept):
    attempt, seen = card_of(fits, gain)
    results = train_step_gpu.doubled(attempt)
    assert seen == tried
    assert [result["batch"] for result in results] == kept


def test_mfu_in_the_table_is_that_of_the_median_step():
    card = train_step_gpu.Card("gpu", seq=2048, dtype="bfloat16", steps=5)
    one = {"setting": "none", "batch": 16, "peak GiB": 70.0, "device": "NVIDIA H200", "loss": 10.8}
    tries = [{**one, "step s": seconds} for seconds in (0.9, 0.5, 0.4)]
    row = train_step_gpu.summary(card, "1.4b", tries)
    # 1.4b: 24 layers of 12 x 2048^2 weights, the unembedding, and half of all pairs; times 6.
    flops = 6 * 16 * 2048 * (24 * 12 * 2048**2 + 50304 * 2048 + 24 * 2048 * 2048)
    assert row["MFU"] == pytest.approx(flops / 0.5 / 989e12)
    assert row["tokens/s"] == pytest.approx(16 * 2048 / 0.5)
    slower = {**row, "tokens/s": row["tokens/s"] / 2}
    table = train_step_gpu.table({"1.4b": {"pythia_jax": row, "torch": slower}})
    assert f"| {row['MFU']:.1%} | 2.00 |" in table


@pytest.mark.parametrize("word", ["RESOURCE_EXHAUSTED: Out of memory", "CUDA out of memory. Tried"])
def test_running_out_of_memory_is_told_from_other_errors(monkeypatch, word):
    task = {"card": {"platform": "gpu", "seq": 8, "dtype": "bfloat16", "steps": 1}}
    task |= {"name": "torch", "size": "14m", "setting": "compile", "batch": 1}

    def fail(*_):
        raise RuntimeError(said)

    monkeypatch.setitem(train_step_gpu.work.__globals__, "build", fail)
    said = word
    assert train_step_gpu.work(task) is None
    said = "no such thing as a card"
    with pytest.raises(RuntimeError, match="no such thing"):
        train_step_gpu.work(task)


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
def test_the_moments_benchmark_prints_rebuilt_ones_beside_zero():
    small = ["--step", "4", "--after", "2", "--steps", "8", "--windows", "2", "--width", "32"]
    printed = script_output("rebuilt_moments.py", *small, "--characters", "300000")
    rows = dict(re.findall(r"^\| ([^|]+) \| (.*) \|$", printed, re.MULTILINE))
    assert {"zero", "rebuild:2", "sums of 2 as they are"} < set(rows)
    zero, rebuilt, sums = (rows[n].split(" | ") for n in rows if n not in ("moments", "---"))
    assert zero[:6] == ["-"] * 6 and float(zero[6]) > 0
    # A factor changes no cosine. Of 4 batches the true sums are the larger.
    assert rebuilt[:4] == sums[:4] and float(sums[5]) < float(rebuilt[5])


@pytest.mark.slow
def test_the_convert_benchmark_prints_ours_beside_orbax_and_transformers(tmp_path):
    out = tmp_path / "results.json"
    printed = script_output("convert.py", "--size", "14m", "--folder", tmp_path, "--out", out)
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 4
    for name, row in rows.items():
        assert f"| {name} |" in printed
        assert row["s"] > 0 and row["peak bytes"] > 100e6
    orbax = rows["Orbax save, arrays in memory"]
    for row in rows.values():
        assert row["speed"] == pytest.approx(orbax["s"] / row["s"])
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"], "weights were left"


@pytest.mark.slow
def test_the_scoring_benchmark_prints_ours_beside_hf(tmp_path):
    out = tmp_path / "results.json"
    small = ["--size", "14m", "--requests", "8", "--repeats", "1"]
    printed = script_output("evaluate.py", *small, "--out", out)
    measured = json.loads(out.read_text())["measured"]
    assert len(measured) == 3
    for kind, rows in measured.items():
        assert len(rows) == 4
        for name, row in rows.items():
            assert f"| {kind} | {name} |" in printed
            assert row["largest difference"] <= 1e-4, "not one and the same scores"
            assert row["rows/s"] == pytest.approx(8 / row["wall s"])
    assert "times as many rows a second as the best of hf (aim: 1.5)" in printed


@pytest.mark.slow
def test_the_order_of_a_tenth_of_the_pile_costs_at_most_twice_its_shuffles():
    printed = script_output("data_order.py")
    match = re.search(r"takes ([\d.]+) times as long .* its process ([\d.]+) times", printed)
    assert match, printed
    times, memory = map(float, match.groups())
    assert times <= 2 and memory <= 3
