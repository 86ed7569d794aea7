"""Several processes save one checkpoint, and restore what another number of them saved."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_runs import folder_of, like, opened, random_state
from small_runs import Make, assert_same_bits

from pythia_jax import configs
from pythia_jax.configs import RunConfig

SCRIPT = Path(__file__).with_name("saving_process.py")


def go_on(config: RunConfig, processes: int) -> tuple[str, str]:
    """Go on with a run in several processes; the step they did so from, and process 0's log."""
    path = folder_of(config).with_suffix(".yaml")
    configs.save(config, path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, SCRIPT, path, address, str(processes), str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    told = [process.communicate(timeout=120) for process in started]
    for process, (_, log) in zip(started, told, strict=True):
        assert process.returncode == 0, log[-3000:]
    steps = {out.splitlines()[-1] for out, _ in told}
    assert len(steps) == 1, "they did not go on from one step"
    return steps.pop(), told[0][1]


def small(make_config: Make) -> RunConfig:
    return make_config(model={"vocab_size": 96})


def test_processes_save_together_and_agree_on_what_is_damaged(make_config: Make) -> None:
    config = small(make_config)
    assert go_on(config, 2)[0] == "None"
    with opened(config) as run:  # one process
        found = run.restore_newest()
    assert found is not None and found[0] == 2
    assert_same_bits(found[1], random_state(like(config), 2))
    # Only the process whose share lies in this file can see that it is gone.
    checkpoint = folder_of(config) / "checkpoints" / "2"
    largest = max(
        (checkpoint / "state").glob("ocdbt.process_1/d/*"), key=lambda p: p.stat().st_size
    )
    largest.unlink()
    step, log = go_on(config, 2)
    assert step == "1" and f"{checkpoint}: " in log
    assert checkpoint.with_name("2.damaged").is_dir()


@pytest.mark.slow
def test_any_number_of_processes_goes_on_from_any_other(make_config: Make) -> None:
    config = small(make_config)
    steps = [go_on(config, processes)[0] for processes in (2, 4, 1, 2)]
    assert steps == ["None", "2", "5", "8"]
