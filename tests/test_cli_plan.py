"""`pythia-jax plan` as its user types it, in a process of its own: it sets JAX's environment."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def plan(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pythia_jax", "plan", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(autouse=True)
def _libtpu() -> None:
    pytest.importorskip("libtpu", reason="compiling for TPUs takes libtpu: pip install '.[tpu]'")


def test_the_impossible_answers_in_seconds_with_what_would_fit(tmp_path: Path) -> None:
    began = time.monotonic()
    done = plan(
        "configs/pythia-12b.yaml", "--topology", "v5litepod-4", "--json", tmp_path / "plan.json"
    )
    assert time.monotonic() - began < 60  # Seconds where the machine is free.
    assert done.returncode == 1
    assert "DOES NOT FIT: 44." in done.stdout
    assert "--topology v5e:4x4" in done.stdout
    assert done.stderr == ""
    values = json.loads((tmp_path / "plan.json").read_text())
    assert values["fits"] is False and values["memory"] is None
    assert values["advice"][0].startswith("--topology v5e:4x4")


def test_a_wrong_topology_is_one_line() -> None:
    done = plan("configs/pythia-70m.yaml", "--topology", "v5e:5x5")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "v5e:4x4" in done.stderr


def test_a_wrong_key_is_refused_before_anything_is_compiled() -> None:
    done = plan("configs/pythia-70m.yaml", "--topology", "v5e:4x4", "--training.remta", "dots")
    assert done.returncode == 1
    assert "remat" in done.stderr


def test_a_kernel_that_cannot_run_there_is_refused() -> None:
    done = plan("configs/pythia-70m.yaml", "--topology", "v5e:4x4", "--training.attention", "cudnn")
    assert done.returncode == 1
    assert "NVIDIA" in done.stderr
