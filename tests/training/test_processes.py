"""Several real processes train as one: the same losses, the same ends, the same way on."""

import os
import signal
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from small_runs import Make, assert_same_bits

import pythia_jax as pj
from launch.local_pod import PodResult, run_pod
from pythia_jax import configs
from pythia_jax.configs import RunConfig
from pythia_jax.training.telemetry import MEASURED, read_metrics
from pythia_jax.training.trainer import train

MODEL = {"vocab_size": 104}


def pod(config: RunConfig, processes: int, *flags: str, **how) -> PodResult:
    path = Path(config.checkpoint.directory).with_suffix(".yaml")
    configs.save(config, path)
    command = [sys.executable, "-m", "pythia_jax", "train", "--pod", str(path)]
    heartbeat = ["--distributed.heartbeat-seconds", "10"]
    return run_pod([*command, *heartbeat, *flags], processes, **how)


def numbers(folder: str | Path) -> list[dict]:
    lines = read_metrics(Path(folder) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def final(config: RunConfig) -> dict:
    return pj.load(config.checkpoint.directory).params


@pytest.mark.parametrize(
    ("processes", "devices"), [(2, 2), pytest.param(4, 1, marks=pytest.mark.slow)]
)
def test_processes_agree_with_one(make_config: Make, processes: int, devices: int) -> None:
    changes = {"model": MODEL, "training": {"batch_size": 8, "gradient_accumulation": 1}}
    alone = train(make_config("alone", **changes), show_progress=False)
    config = make_config("together", **changes)
    result = pod(config, processes, devices_per_process=devices)
    assert result.status == 0, result.output
    keys = ("loss", "validation_loss", "grad_norm")
    one, many = (
        [line[key] for line in numbers(folder) for key in keys if key in line]
        for folder in (alone.folder, config.checkpoint.directory)
    )
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-5)
    last = [line for output in result.output for line in output if line.startswith("checkpoint")]
    assert len(last) == 1  # one process speaks for all


@pytest.mark.slow
def test_processes_start_from_weights_as_one_does(make_config: Make, tmp_path: Path) -> None:
    changes = {"model": MODEL, "training": {"batch_size": 8, "gradient_accumulation": 1}}
    earlier = train(make_config("earlier", **changes), stop_at=4, show_progress=False)
    pj.save_hf(pj.load(earlier.folder), tmp_path / "hf")
    source = {"model": str(tmp_path / "hf"), "step": 4, "optimizer_state": "rebuild:3"}
    one, two = (
        make_config(name, **changes, initialize_from=source, checkpoint={"extra_steps": []})
        for name in ("one", "two")
    )
    for config, processes, devices in ((one, 1, 1), (two, 2, 2)):
        result = pod(config, processes, devices_per_process=devices)
        assert result.status == 0, result.output
    alone, together = (
        [(line["step"], line["loss"]) for line in numbers(c.checkpoint.directory) if "loss" in line]
        for c in (one, two)
    )
    assert [step for step, _ in together] == [step for step, _ in alone]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)


def interrupt(config: RunConfig, number: int) -> None:
    """Signal this process, which passes it on to the pod, once some steps are logged."""
    metrics = Path(config.checkpoint.directory) / "metrics.jsonl"

    def wait_and_signal() -> None:
        while not (metrics.is_file() and metrics.stat().st_size > 3000):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait_and_signal, daemon=True).start()


def test_a_pod_told_to_leave_saves_says_so_and_goes_on_bitwise(make_config: Make) -> None:
    changes = {
        "model": MODEL,
        "training": {"batch_size": 8, "steps": 3000},
        "checkpoint": {"every": 3000, "extra_steps": []},
    }
    cut, straight = (make_config(name, **changes) for name in ("cut", "straight"))
    interrupt(cut, signal.SIGTERM)
    result = pod(cut, 2)
    assert result.status == 75, result.output
    step = max(int(path.name) for path in Path(cut.checkpoint.directory).glob("resume/[0-9]*"))
    assert 0 < step < 3000
    assert any(f"saved at step {step}" in line for line in result.output[0])

    stop = ("--stop-at", str(step + 5))
    assert pod(cut, 2, *stop).status == 0
    assert pod(straight, 2, *stop).status == 0
    assert_same_bits(final(cut), final(straight))
    assert numbers(cut.checkpoint.directory) == numbers(straight.checkpoint.directory)


@pytest.mark.slow
def test_a_process_alone_told_to_leave_does_the_same(make_config: Make) -> None:
    config = make_config(training={"steps": 3000})
    path = Path(config.checkpoint.directory).with_suffix(".yaml")
    configs.save(config, path)
    interrupt(config, signal.SIGTERM)
    command = [sys.executable, "-m", "pythia_jax", "train", str(path)]
    result = run_pod(command, 1)
    assert result.status == 75, result.output
    assert any("start again to go on" in line for line in result.output[0])


@pytest.mark.slow
def test_a_pods_clock_saves_once_each_time(make_config: Make) -> None:
    config = make_config(
        model=MODEL,
        training={"batch_size": 8, "steps": 60},
        checkpoint={
            "every": 1000,
            "extra_steps": [],
            "keep_resume": 100,
            "resume_every_minutes": 0.02,
        },
    )
    assert pod(config, 2, "--stop-at", "40").status == 0
    steps = sorted(
        int(path.name) for path in Path(config.checkpoint.directory).glob("resume/[0-9]*")
    )
    assert steps[-1] == 40
    # One due is handed in at a step, told at the next and saved there.
    assert all(later - step > 1 for step, later in pairwise(steps[:-1])), steps
