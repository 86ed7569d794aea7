"""A run on preshuffled rows is the run on the order they were made from."""

import json
from pathlib import Path

import numpy as np
import pytest
from small_runs import Make

from pythia_jax import configs, data
from pythia_jax.configs import ConfigError, RunConfig
from pythia_jax.training.trainer import run_folder, train


def losses(config: RunConfig) -> list[float]:
    lines = (Path(config.checkpoint.directory) / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def write_rows(config: RunConfig, path: Path) -> None:
    np.concatenate(list(data.batches(config))).astype("<u2").tofile(path)


def test_training_on_rows_without_an_index_gives_the_losses_of_the_order_they_hold(
    make_config: Make, tmp_path: Path
) -> None:
    ordered = make_config("ordered", data={"validation": []})
    write_rows(ordered, tmp_path / "rows.bin")
    where = {"train": [str(tmp_path / "rows")], "validation": [], "order": "preshuffled"}
    lying = make_config("lying", data=where)
    for config in (ordered, lying):
        train(config, show_progress=False, stop_at=3)
    assert losses(lying) == losses(ordered) != []


def test_a_run_on_other_rows_of_the_same_size_is_refused(make_config: Make, tmp_path: Path) -> None:
    write_rows(make_config(), tmp_path / "rows.bin")
    where = {"train": [str(tmp_path / "rows")], "validation": [], "order": "preshuffled"}
    config = make_config(data=where)
    with run_folder(config):
        pass
    write_rows(make_config(data={"seed": 5}), tmp_path / "rows.bin")
    with pytest.raises(ConfigError, match=r"other data: data\.train"), run_folder(config):
        pass
    assert configs.load(tmp_path / "run" / "config.yaml") == config
