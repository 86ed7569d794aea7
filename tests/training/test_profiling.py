"""Profiles: of the steps asked for, whole, and put away whatever ends the loop."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pythia_jax.training.profiling import Profile


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Begin and end of traces, and of marks of steps in them, as they come."""
    made: list[str] = []

    class Mark:
        def __init__(self, name: str, step_num: int) -> None:
            self.name = f"{name} {step_num}"

        def __enter__(self) -> None:
            made.append(f"begin {self.name}")

        def __exit__(self, *_: object) -> None:
            made.append(f"end {self.name}")

    def waited(state: Any) -> None:
        made.append(f"wait {state}")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: made.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: made.append("stop"))
    monkeypatch.setattr(jax.profiler, "StepTraceAnnotation", Mark)
    monkeypatch.setattr(jax, "block_until_ready", waited)
    return made


def test_the_steps_asked_for_are_traced_and_marked(calls: list[str], tmp_path: Path) -> None:
    with Profile(tmp_path, first_step=1, steps=2) as profile:
        for step in range(5):
            profile.step(step, f"state {step}")
    assert calls == [
        *("wait state 1", "start", "begin train 1", "end train 1", "begin train 2"),
        *("wait state 3", "end train 2", "stop"),
    ]


def test_a_loop_that_ends_early_ends_its_trace(calls: list[str], tmp_path: Path) -> None:
    with pytest.raises(KeyError), Profile(tmp_path, first_step=0, steps=5) as profile:
        profile.step(0)
        raise KeyError
    assert calls[-1] == "stop"


@pytest.mark.parametrize(("last", "traced"), [(0, 0), (3, 2), (4, 3)])
def test_steps_that_are_not_there_to_be_traced_are_told(
    calls: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, last: int, traced: int
) -> None:
    with Profile(tmp_path, first_step=2, steps=3) as profile:
        for step in range(1, last + 1):
            profile.step(step)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == (traced < 3)
    assert all(f"{traced} of 3 steps traced" in message for message in warned)


def test_nothing_is_traced_unless_asked_for(calls: list[str], tmp_path: Path) -> None:
    with Profile(tmp_path, first_step=0, steps=0) as profile:
        profile.step(0)
    assert calls == []
    with pytest.raises(ValueError, match="steps to profile: -1"):
        Profile(tmp_path, 0, -1)


def test_a_real_profile_lies_where_tensorboard_looks_for_it(tmp_path: Path) -> None:
    f = jax.jit(lambda x: x @ x)
    x = f(jnp.eye(8))
    with Profile(tmp_path, first_step=0, steps=1) as profile:
        profile.step(0, x)
        x = f(x)
        profile.step(1, x)
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))
