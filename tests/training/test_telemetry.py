"""Metrics: what a line counts, which steps have one, and what stops a run."""

import json
import logging
import math
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from small_runs import Make
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pythia_jax.configs import RunConfig
from pythia_jax.training import telemetry
from pythia_jax.training.flops import model_flops
from pythia_jax.training.records import read_metrics
from pythia_jax.training.telemetry import MEASURED, NonFiniteError, Telemetry

NAN = math.nan


def metrics(loss: Any = 1.0, **others: Any) -> dict[str, Any]:
    """What a step gives."""
    values = {"loss": loss, "grad_norm": 1.0, "updated": True, "halted": False, **others}
    return {n: v if isinstance(v, Loss) else jnp.asarray(v) for n, v in values.items()}


class Device:
    def __init__(self, kind: str) -> None:
        self.device_kind = kind


class Loss:
    """A loss that takes its time, comes from made-up devices, or never comes."""

    def __init__(
        self, seconds: float = 0.0, kinds: tuple[str, ...] = ("cpu",), error: str = ""
    ) -> None:
        self.ready, self.error = time.perf_counter() + seconds, error
        self.sharding = SimpleNamespace(device_set={Device(kind) for kind in kinds})

    def __float__(self) -> float:
        time.sleep(max(0.0, self.ready - time.perf_counter()))
        if self.error:
            raise FloatingPointError(self.error)
        return 1.0


def told(config: RunConfig, start: int = 0, schedule: Any = lambda _: 0.5, **how: Any) -> Telemetry:
    folder = how.get("folder") or Path(config.checkpoint.directory)
    folder.mkdir(exist_ok=True)
    return Telemetry(config, start, schedule, show_progress=False, **how)


def lines(config: RunConfig) -> list[dict]:
    return read_metrics(Path(config.checkpoint.directory) / "metrics.jsonl")


def test_waits_before_a_pause_are_not_counted_after_it(make_config: Make) -> None:
    config = make_config(logging={"every": 3})
    with told(config) as run:
        for step, wait in enumerate((0.0, 50.0, 50.0)):
            run.step(step, metrics(), wait)
        run.flush()
        run.restart_clock()
        run.step(3, metrics(), 0.25)
    assert [(line["step"], line["data_wait_s"]) for line in lines(config)] == [(0, 0.0), (3, 0.25)]


def test_a_step_is_recorded_one_step_late(make_config: Make) -> None:
    config = make_config()
    with told(config) as run:
        run.step(0, metrics(2.0), 0.0)
        assert lines(config) == []
        run.step(1, metrics(3.0), 0.0)
        assert [line["loss"] for line in lines(config)] == [2.0]
    assert [line["loss"] for line in lines(config)] == [2.0, 3.0]


def test_lines_come_every_so_many_steps_and_at_the_end(make_config: Make) -> None:
    config = make_config(logging={"every": 8})
    with told(config) as run:
        for step in range(20):
            run.step(step, metrics(float(step)), 0.0)
    assert [line["step"] for line in lines(config)] == [0, 8, 16, 19]
    assert [line["loss"] for line in lines(config)] == [0, 8, 16, 19]


def test_speeds_are_those_of_the_clock_and_compilation_is_none_of_them(make_config: Make) -> None:
    config = make_config(logging={"every": 1})
    began = time.perf_counter()
    time.sleep(0.6)  # compilation
    with told(config, began=began) as run:
        for step in range(4):
            run.step(step, metrics(Loss(0.1)), 0.0)
            run.flush()
    for line in lines(config):
        # Not less than the sleep; a busy machine may take longer.
        assert 0.099 < line["compute_s"] <= line["step_time_s"] < 0.5
        assert line["tokens_per_second"] == pytest.approx(4 * 32 / line["step_time_s"])
    elapsed = time.perf_counter() - began
    trained = sum(line["compute_s"] for line in lines(config))
    assert trained / elapsed * 0.9 < lines(config)[-1]["goodput"] < trained / (0.6 + trained) + 1e-6


def test_steps_that_a_killed_attempt_had_done_are_no_good_put(make_config: Make) -> None:
    config = make_config()
    Path(config.checkpoint.directory).mkdir()
    path = Path(config.checkpoint.directory) / "metrics.jsonl"
    old: list[dict] = [{"step": step, "loss": 9.0} for step in range(7)]
    old.append({"step": 8, "validation_loss": 1.0})
    path.write_text("".join(json.dumps(line) + "\n" for line in old))
    with told(config, start=5) as run:
        for step in range(5, 9):
            run.step(step, metrics(Loss(0.02)), 0.0)
            run.flush()
    goodput = {line["step"]: line["goodput"] for line in lines(config) if "goodput" in line}
    assert goodput[5] == goodput[6] == 0 < goodput[7] < goodput[8]
    assert [line["loss"] for line in lines(config)] == [9.0] * 5 + [1.0] * 4


@pytest.mark.parametrize(
    ("kind", "precision", "peak"),
    [("TPU v5 lite", "bfloat16", 197e12), ("NVIDIA H200", "float32", 67e12)],
)
def test_mfu_is_model_flops_over_the_peak_of_all_devices(
    make_config: Make, kind: str, precision: str, peak: float
) -> None:
    config = make_config(training={"precision": precision})
    with told(config) as run:
        run.step(0, metrics(Loss(kinds=(kind, kind))), 0.0)
    (line,) = lines(config)
    assert config.model is not None
    work = model_flops(config.model, 4, 32)
    assert line["mfu"] == pytest.approx(work / line["step_time_s"] / (2 * peak))


@pytest.mark.parametrize(
    ("kind", "precision"), [("cpu", "float32"), ("TPU v4", "float32"), ("A new card", "bfloat16")]
)
def test_mfu_is_left_out_where_the_peak_is_unknown(
    make_config: Make, kind: str, precision: str
) -> None:
    config = make_config(training={"precision": precision})
    with told(config) as run:
        run.step(0, metrics(Loss(kinds=(kind,))), 0.0)
    assert "mfu" not in lines(config)[0]


def test_the_fullest_device_tells_the_memory(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert telemetry.peak_memory_bytes() is None, "a CPU tells none"
    devices = [SimpleNamespace(memory_stats=lambda n=n: {"peak_bytes_in_use": n}) for n in (5, 7)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    config = make_config()
    with told(config) as run:
        run.step(0, metrics(), 0.0)
    assert lines(config)[0]["peak_memory_bytes"] == 7


def test_the_learning_rate_follows_the_updates_and_not_the_steps(make_config: Make) -> None:
    config = make_config()
    with told(config, schedule=lambda n: n / 8) as run:
        run.step(0, metrics(updates=0), 0.0)
        run.step(1, metrics(NAN, updates=1, updated=False), 0.0)
        run.step(2, metrics(updates=1), 0.0)
    rates = [line.get("learning_rate") for line in lines(config)]
    assert rates == [0.0, None, 0.125]
    assert all("updates" not in line for line in lines(config))


def test_skipped_steps_always_have_a_line_and_no_value_that_is_no_number(
    make_config: Make, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(training={"on_nonfinite": "skip"}, logging={"every": 4})
    with told(config) as run:
        run.step(0, metrics(), 0.0)
        run.step(1, metrics(NAN, grad_norm=math.inf, updated=False), 0.0)
        run.step(2, metrics(3.0, grad_norm=NAN, updated=False), 0.0)
        run.step(3, metrics(), 0.0)
        run.step(4, metrics(NAN, grad_norm=NAN, updated=False), 0.0)
    first, *skipped = lines(config)
    assert "skipped" not in first
    assert skipped[:2] == [{"step": 1, "skipped": True}, {"step": 2, "loss": 3.0, "skipped": True}]
    assert skipped[2]["skipped"] and set(skipped[2]) - MEASURED == {"step", "skipped"}
    assert skipped[2]["tokens_per_second"] > 0
    warned = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(warned) == 3 and warned[0].startswith("step 1: ")


def test_an_overflow_of_float16_is_told_with_its_scale_and_without_a_warning(
    make_config: Make, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(training={"precision": "float16"}, logging={"every": 4})
    with caplog.at_level(logging.WARNING), told(config) as run:
        run.step(0, metrics(loss_scale=4096.0), 0.0)
        run.step(1, metrics(NAN, grad_norm=NAN, updated=False, loss_scale=4096.0), 0.0)
    assert lines(config)[1] == {"step": 1, "loss_scale": 4096.0, "skipped": True}
    assert not caplog.records


def test_a_halted_step_stops_the_run_before_anything_of_it_is_written(make_config: Make) -> None:
    config = make_config()
    with pytest.raises(NonFiniteError, match=r"step 1: .*nan.*newest checkpoint") as raised:  # noqa: SIM117
        with told(config) as run:
            run.step(0, metrics(), 0.0)
            run.step(1, metrics(NAN, updated=False, halted=True), 0.0)
            run.step(2, metrics(updated=False, halted=True), 0.0)
    assert raised.value.step == 1
    assert [line["step"] for line in lines(config)] == [0]


def test_a_loss_that_is_no_number_stops_a_run_even_if_it_was_used(make_config: Make) -> None:
    config = make_config()
    with pytest.raises(NonFiniteError, match="step 0: "), told(config) as run:
        run.step(0, metrics(NAN), 0.0)
    with pytest.raises(NonFiniteError, match="step 8: "), told(config) as run:
        run.write(8, {"validation_loss": math.inf})
    assert lines(config) == []


def test_what_computing_raised_is_raised_where_it_is_asked_for(make_config: Make) -> None:
    with pytest.raises(FloatingPointError, match="on fire"), told(make_config()) as run:
        run.step(0, metrics(Loss(error="the device is on fire")), 0.0)
        run.step(1, metrics(), 0.0)


def test_who_leaves_by_an_error_leaves_no_step_under_way(make_config: Make) -> None:
    slow = Loss(0.5)
    with pytest.raises(KeyboardInterrupt), told(make_config()) as run:
        run.step(0, metrics(), 0.0)
        run.step(1, metrics(slow), 0.0)
        raise KeyboardInterrupt
    assert time.perf_counter() >= slow.ready
    assert not [thread for thread in threading.enumerate() if "metrics of" in thread.name]


def test_only_process_0_writes_and_all_stop(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    config = make_config()
    with pytest.raises(NonFiniteError), told(config) as run:
        run.step(0, metrics(), 0.0)
        run.step(1, metrics(halted=True), 0.0)
        run.flush()
    assert list(Path(config.checkpoint.directory).iterdir()) == []


def test_a_folder_of_its_own_takes_all_that_is_written(make_config: Make, tmp_path: Path) -> None:
    config, folder = make_config(), tmp_path / "elsewhere"
    with told(config, folder=folder) as run:
        run.step(0, metrics(2.5), 0.0)
        run.flush()
        run.write(1, {"validation_loss": 3.5})
    assert not Path(config.checkpoint.directory).exists()
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [0, 1]
    events = EventAccumulator(str(folder / "events")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 2.5)]
    assert [(e.step, e.value) for e in events.Scalars("validation_loss")] == [(1, 3.5)]


def test_a_jump_of_the_loss_is_warned_of(
    make_config: Make, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(training={"steps": 100}, logging={"every": 50})
    with told(config) as run:
        for step in range(60):
            run.step(step, metrics(2.0 + 0.1 * (step % 2) + 5.0 * (step == 55)), 0.0)
    (warning,) = [r.getMessage() for r in caplog.records if "spike" in r.getMessage()]
    assert warning.startswith("step 55: loss spike: 7.100")
