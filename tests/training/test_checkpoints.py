"""Checkpoints: which are kept, which is the newest whole one, and what a kill may leave."""

import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from small_runs import Make, assert_same_bits

from pythia_jax import configs
from pythia_jax.configs import RunConfig
from pythia_jax.training import checkpoints
from pythia_jax.training.checkpoints import Checkpoints
from pythia_jax.training.trainer import jitted_init, train

# Saves states between scheduled steps until the deletion of an old one has begun; dies in it.
DIE_DELETING = """
import os, sys
from pythia_jax import configs
from pythia_jax.training.checkpoints import Checkpoints
from pythia_jax.training.trainer import jitted_init

removed = []
def watch(event, args):
    if event == "shutil.rmtree" and "/resume/" in str(args[0]) and "orbax" not in str(args[0]):
        removed.append(args[0])
    if event == "os.remove" and removed:
        removed.append(args[0])
        if len(removed) == 4:
            os._exit(9)
sys.addaudithook(watch)

config = configs.load(sys.argv[1])
state = jitted_init(config)
with Checkpoints(config) as checkpoints:
    for step in range(20):
        checkpoints.save(step, state)
"""


def test_kill_in_the_deletion_of_a_state_leaves_no_half_of_it(
    make_config: Make, tmp_path: Path
) -> None:
    config = make_config(
        checkpoint={"every": 100, "extra_steps": [], "resume_every_minutes": 1e-9, "keep_resume": 1}
    )
    configs.save(config, tmp_path / "run.yaml")
    command = [sys.executable, "-c", DIE_DELETING, str(tmp_path / "run.yaml")]
    assert subprocess.run(command, check=False).returncode == 9, "it did not die in a deletion"
    resume = Path(config.checkpoint.directory) / "resume"
    assert any((resume / checkpoints.DELETED).iterdir())
    with Checkpoints(config) as opened:
        steps = [int(path.name) for path in resume.iterdir() if path.name.isdigit()]
        assert steps and opened.newest() == max(steps)
        for step in steps:
            assert_same_bits(opened.restore(step), jitted_init(config))
    assert not (resume / checkpoints.DELETED).exists()


def test_what_a_killed_process_left_half_written_is_cleared_away(make_config: Make) -> None:
    config = make_config()
    folder = Path(config.checkpoint.directory)
    for place in ("checkpoints", "resume"):
        (folder / place / "7.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with Checkpoints(config) as opened:
        assert opened.newest() is None
        opened.save(0, jitted_init(config))
        opened.save(3, jitted_init(config), leaving=True)
    left = sorted(path.name for path in folder.glob("*/*"))
    assert left == ["0", "3"]


def test_going_on_with_another_archive_finds_the_newest_whole_state(make_config: Make) -> None:
    whole, light = make_config(), make_config(checkpoint={"archive": "params"})
    states = [jitted_init(whole).replace(step=jnp.int32(step)) for step in range(11)]  # type: ignore
    with Checkpoints(whole) as opened:
        opened.save(0, states[0])
        opened.save(2, states[2])
    with Checkpoints(light) as opened:  # whole states in checkpoints/, nothing in resume/
        assert opened.newest() == 2
        assert int(opened.restore(2).step) == 2
        opened.save(7, states[7], leaving=True)
        opened.save(10, states[10])
    with Checkpoints(whole) as opened:  # the newest scheduled one is of parameters alone
        assert opened.newest() == 7
        assert int(opened.restore(7).step) == 7
        opened.save(10, states[10], leaving=True)
    with Checkpoints(light) as opened:
        assert opened.newest() == 10
        assert int(opened.restore(10).step) == 10


def test_the_first_parameters_archived_go_with_a_whole_state(make_config: Make) -> None:
    config = make_config(checkpoint={"archive": "params"})
    state = jitted_init(config)
    with Checkpoints(config) as opened:
        for step in (0, 1, 2):
            opened.save(step, state)
        assert opened.newest() == 0
    resume = Path(config.checkpoint.directory) / "resume"
    assert [path.name for path in resume.iterdir()] == ["0"]


def test_checkpoints_of_parameters_alone_are_not_trained_over(make_config: Make) -> None:
    config = make_config(checkpoint={"archive": "params"})
    folder = Path(config.checkpoint.directory)
    with Checkpoints(config) as opened:
        for step in (0, 1, 2):
            opened.save(step, jitted_init(config))
    shutil.rmtree(folder / "resume")
    metrics = folder / "metrics.jsonl"
    metrics.write_text('{"step": 0, "loss": 1.0}\n')
    for archive in ("params", "state"):
        with pytest.raises(RuntimeError, match=r"steps 0, 1, 2, but of each the parameters alone"):
            train(make_config(checkpoint={"archive": archive}), show_progress=False)
    assert metrics.read_text() == '{"step": 0, "loss": 1.0}\n'


def test_the_schedule_is_not_worked_out_again_at_every_step(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real = [], RunConfig.checkpoint_steps.fget
    assert real is not None
    monkeypatch.setattr(
        RunConfig, "checkpoint_steps", property(lambda self: asked.append(1) or real(self))
    )
    with Checkpoints(make_config()) as opened:
        assert [step for step in range(21) if opened.due(step)] == [0, 1, 2, 4, 5, 10, 15, 20]
    assert len(asked) == 1


def test_another_runtime_is_told(make_config: Make, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config()
    with Checkpoints(config) as opened:
        opened.save(0, jitted_init(config))
    with (
        caplog.at_level("WARNING", "pythia_jax"),
        Checkpoints(make_config(training={"remat": "full"})) as opened,
    ):
        opened.restore(0)
    assert "equal to rounding only: runtime.remat none -> full" in caplog.text
