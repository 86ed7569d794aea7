"""A run that begins with a state it is given: where it begins, what it saves, what it refuses."""

from pathlib import Path
from typing import Any

import jax
import pytest
from small_runs import Make, assert_same_bits

import pythia_jax as pj
from pythia_jax import configs
from pythia_jax.configs import ConfigError, RunConfig
from pythia_jax.training.rebuild import zero_state
from pythia_jax.training.step import TrainState, init_state
from pythia_jax.training.telemetry import read_metrics
from pythia_jax.training.trainer import train

SOURCE = {"model": "there", "step": 7, "optimizer_state": "zero"}


fresh = jax.jit(init_state, static_argnums=0)


def beginning(make_config: Make, name: str = "run", **sections: dict) -> RunConfig:
    """A config that begins at step 7 of 12."""
    sections = {"training": {"steps": 12}, **sections}
    plain = configs.to_dict(make_config(name, **sections))
    return configs.from_dict({**plain, "initialize_from": SOURCE})


def at_step_7(config: RunConfig, mesh: Any) -> TrainState:
    return zero_state(fresh(config).params, 7, config, mesh)


def never(config: RunConfig, mesh: Any) -> TrainState:
    raise AssertionError("the source was asked for again")


@pytest.mark.parametrize("archive", ["state", "params"])
def test_a_run_begins_at_its_step_and_goes_on_without_its_source(make_config: Make, archive: str):
    straight = beginning(make_config, "straight", checkpoint={"archive": archive})
    cut = beginning(make_config, "cut", checkpoint={"archive": archive})
    whole = train(straight, initial=at_step_7, show_progress=False)
    assert (whole.resumed_from, whole.step) == (None, 12)
    for stop, resumed in ((7, None), (9, 7), (None, 9)):
        part = train(
            cut, initial=never if resumed else at_step_7, stop_at=stop, show_progress=False
        )
        assert part.resumed_from == resumed
    assert train(cut, show_progress=False).step == 12  # nothing that reads a source is needed
    assert_same_bits(part.state, whole.state)
    losses = [
        line["step"] for line in read_metrics(whole.folder / "metrics.jsonl") if "loss" in line
    ]
    assert losses == list(range(7, 12))
    assert straight.checkpoint_steps == (7, 10, 12)
    kept = sorted(int(path.name) for path in (whole.folder / "checkpoints").iterdir())
    assert kept == [7, 10, 12]
    assert_same_bits(pj.load(whole.folder, step=7).params, fresh(straight).params)


def test_a_run_killed_after_its_first_save_has_a_state_to_go_on_from(make_config: Make) -> None:
    config = beginning(make_config, checkpoint={"archive": "params"})
    folder = train(config, initial=at_step_7, stop_at=7, show_progress=False).folder
    assert [path.name for path in (folder / "resume").iterdir()] == ["7"]


def test_a_source_that_nobody_reads_is_refused_before_anything_is_written(
    make_config: Make, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"initialize_from.model: 'there' .*start.prepare"):
        train(beginning(make_config), show_progress=False)
    assert not (tmp_path / "run").exists()


def test_another_source_is_refused_in_a_run_that_has_begun(make_config: Make) -> None:
    config = beginning(make_config)
    train(config, initial=at_step_7, stop_at=7, show_progress=False)
    plain = configs.to_dict(config)
    changed = configs.from_dict({**plain, "initialize_from": {**SOURCE, "step": 5}})
    with pytest.raises(ConfigError, match=r"initialize_from.step was 7, is 5"):
        train(changed, initial=never, show_progress=False)
    without = configs.from_dict({**plain, "initialize_from": None})
    with pytest.raises(ConfigError, match=r"initialize_from was .*there.* is not set"):
        train(without, show_progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 13}, r"initialize_from.step: 13 .*ends at step 12"),
        ({"step": -1}, r"initialize_from.step: -1"),
        ({"model": ""}, r"initialize_from.model: ''"),
        ({"optimizer_state": "rebuild"}, r"optimizer_state: 'rebuild' .*rebuild:60"),
        ({"optimizer_state": "rebuild:0"}, r"optimizer_state: 'rebuild:0'"),
        ({"optimiser_state": "zero"}, r"nearest known one is 'optimizer_state'"),
    ],
)
def test_impossible_values_are_refused_by_name(make_config: Make, changes: dict, message: str):
    plain = configs.to_dict(make_config(training={"steps": 12}))
    with pytest.raises(ConfigError, match=message):
        configs.from_dict({**plain, "initialize_from": {**SOURCE, **changes}})


def test_the_command_lines_dotted_keys_reach_the_section(make_config: Make, tmp_path: Path) -> None:
    configs.save(make_config(), tmp_path / "run.yaml")
    values = {"model": "70", "revision": "step9", "step": "9", "optimizer-state": "rebuild:60"}
    given = {f"initialize-from.{key}": text for key, text in values.items()}
    source = configs.load(tmp_path / "run.yaml", given).initialize_from
    assert source is not None and source.rebuilt_from == 60
    assert (source.model, source.revision, source.step) == ("70", "step9", 9)
