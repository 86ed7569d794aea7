"""Metrics: what a line counts, and what becomes of one that was cut off."""

from pathlib import Path

import jax.numpy as jnp
from small_runs import Make

from pythia_jax.training import telemetry
from pythia_jax.training.telemetry import read_metrics


def test_waits_before_a_pause_are_not_counted_after_it(make_config: Make) -> None:
    config = make_config(logging={"every": 3})
    Path(config.checkpoint.directory).mkdir()
    metrics = {"loss": jnp.float32(1.0)}
    with telemetry.Telemetry(config, 0, lambda _: 0.0, show_progress=False) as told:
        for step, wait in enumerate((0.0, 50.0, 50.0)):
            told.step(step, metrics, wait)
        told.flush()
        told.restart_clock()
        told.step(3, metrics, 0.25)
    lines = read_metrics(Path(config.checkpoint.directory) / "metrics.jsonl")
    assert [(line["step"], line["data_wait_s"]) for line in lines] == [(0, 0.0), (3, 0.25)]


def test_a_cut_off_line_is_dropped_from_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 2.0}\n{"st')
    telemetry.drop_lines_from(path, 1)
    assert path.read_text() == '{"step": 0, "loss": 1.0}\n'
