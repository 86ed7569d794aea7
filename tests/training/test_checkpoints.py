"""Checkpoints: which are kept, which is the newest whole one, what a kill leaves, other meshes."""

import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_runs import folder_of, like, load, opened, random_state, save_steps
from small_runs import Make, assert_same_bits

from pythia_jax import configs
from pythia_jax.configs import RunConfig
from pythia_jax.training import checkpoints
from pythia_jax.training.checkpoints import Checkpoints

HERE = str(Path(__file__).parent)

# Saves states between scheduled steps until the deletion of an old one has begun; dies in it.
DIE_DELETING = """
import os, sys
sys.path.insert(0, sys.argv[2])
from checkpoint_runs import like, random_state
from pythia_jax import configs
from pythia_jax.training.checkpoints import Checkpoints

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
shape = like(config)
with Checkpoints(config, shape) as checkpoints:
    checkpoints.restore_newest()
    for step in range(20):
        checkpoints.save(step, random_state(shape, step), resume=True)
"""


def newest(config: RunConfig) -> int | None:
    """The step that a run would go on from; its state is checked against the random one."""
    with opened(config) as run:
        found = run.restore_newest()
    if found is None:
        return None
    step, state = found
    assert_same_bits(state, random_state(like(config), step))
    return step


def test_kill_in_the_deletion_of_a_state_leaves_no_half_of_it(
    make_config: Make, tmp_path: Path
) -> None:
    config = make_config(checkpoint={"every": 100, "extra_steps": [], "keep_resume": 1})
    configs.save(config, tmp_path / "run.yaml")
    command = [sys.executable, "-c", DIE_DELETING, str(tmp_path / "run.yaml"), HERE]
    assert subprocess.run(command, check=False).returncode == 9, "it did not die in a deletion"
    resume = folder_of(config) / "resume"
    assert any((resume / checkpoints.DELETED).iterdir())
    steps = [int(path.name) for path in resume.iterdir() if path.name.isdigit()]
    assert steps and newest(config) == max(steps)
    assert not (resume / checkpoints.DELETED).exists()


def test_what_a_killed_process_left_half_written_is_cleared_away(make_config: Make) -> None:
    config = make_config()
    folder = folder_of(config)
    for place in ("checkpoints", "resume"):
        (folder / place / "7.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    save_steps(config, 0, 3, resume=True)
    left = sorted(path.name for path in folder.glob("*/*"))
    assert left == ["0", "3"]


def test_only_what_is_scheduled_or_asked_for_is_saved_and_the_newest_few_kept(
    make_config: Make,
) -> None:
    config = make_config(checkpoint={"keep_resume": 2})
    with opened(config) as run:
        run.restore_newest()
        for step in range(12):
            run.save(step, random_state(like(config), step), resume=step >= 6)
    folder = folder_of(config)
    there = {kind: sorted(int(p.name) for p in (folder / kind).iterdir()) for kind in KINDS}
    assert there == {"checkpoints": [0, 1, 2, 4, 5, 10], "resume": [9, 11]}
    assert newest(config) == 11


KINDS = ("checkpoints", "resume")


def test_going_on_with_another_archive_finds_the_newest_whole_state(make_config: Make) -> None:
    whole, light = make_config(), make_config(checkpoint={"archive": "params"})
    save_steps(whole, 0, 2)
    assert newest(light) == 2  # whole states in checkpoints/, nothing in resume/
    save_steps(light, 7, resume=True)
    save_steps(light, 10)
    assert newest(whole) == 7  # the newest scheduled one is of parameters alone
    save_steps(whole, 10, resume=True)
    assert newest(light) == 10


def test_the_first_parameters_archived_go_with_a_whole_state(make_config: Make) -> None:
    config = make_config(checkpoint={"archive": "params"})
    save_steps(config, 0, 1, 2)
    assert [path.name for path in (folder_of(config) / "resume").iterdir()] == ["0"]
    assert newest(config) == 0


@pytest.mark.parametrize("archive", ["params", "state"])
def test_checkpoints_of_parameters_alone_are_not_trained_over(
    make_config: Make, archive: str
) -> None:
    config = make_config(checkpoint={"archive": "params"})
    save_steps(config, 0, 1, 2)
    shutil.rmtree(folder_of(config) / "resume")
    with (
        opened(make_config(checkpoint={"archive": archive})) as run,
        pytest.raises(RuntimeError, match=r"steps 0, 1, 2, but of each the parameters alone"),
    ):
        run.restore_newest()


def test_what_lies_beyond_the_restored_step_is_written_anew(make_config: Make) -> None:
    config = make_config(checkpoint={"archive": "params"})
    save_steps(config, 0)
    save_steps(config, 1, 2)  # parameters alone: the newest whole state is that of step 0
    shape = like(config)
    other = random_state(shape, 2, seed=1)
    with Checkpoints(config, shape) as run:
        found = run.restore_newest()
        assert found is not None and found[0] == 0
        run.save(0, found[1], resume=False)
        run.save(2, other, resume=False)
    assert_same_bits(load(config, 2).params, other.params)


def test_a_save_before_the_newest_was_asked_for_is_refused(make_config: Make) -> None:
    config = make_config()
    with opened(config) as run, pytest.raises(RuntimeError, match=r"restore_newest\(\) comes"):
        run.save(0, random_state(like(config), 0), resume=False)


def test_the_schedule_is_not_worked_out_again_at_every_step(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real = [], RunConfig.checkpoint_steps.fget
    assert real is not None
    monkeypatch.setattr(
        RunConfig, "checkpoint_steps", property(lambda self: asked.append(1) or real(self))
    )
    with opened(make_config()) as run:
        assert [step for step in range(21) if run.scheduled(step)] == [0, 1, 2, 4, 5, 10, 15, 20]
    assert len(asked) == 1


def test_the_clock_runs_from_the_last_whole_state(make_config: Make) -> None:
    config = make_config(checkpoint={"resume_every_minutes": 1e-9, "archive": "params"})
    with opened(config) as run:
        assert run.clock_due()
    with opened(make_config()) as run:
        assert not run.clock_due()


def test_another_runtime_is_told(make_config: Make, caplog: pytest.LogCaptureFixture) -> None:
    save_steps(make_config(), 0)
    changed = make_config(training={"remat": "full"})
    with caplog.at_level("WARNING", "pythia_jax"), opened(changed) as run:
        run.restore_newest()
    assert "equal to rounding only: runtime.remat none -> full" in caplog.text


def test_parameters_alone_come_in_any_dtype(make_config: Make) -> None:
    config = make_config()
    params = save_steps(config, 0)[0].params
    half = load(config, dtype=jnp.bfloat16)
    assert half.step == 0
    assert_same_bits(half.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def test_a_step_that_is_not_there_is_told_with_those_that_are(make_config: Make) -> None:
    config = make_config()
    with pytest.raises(FileNotFoundError, match="no checkpoint in it yet"):
        load(config)
    save_steps(config, 0, 2)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 1; there are 0, 2"):
        load(config, 1)


def test_the_arrays_may_be_given_up_once_save_has_returned(make_config: Make) -> None:
    # On a CPU Orbax's copy on the host could be the very memory that a step then writes over.
    config = make_config(
        model={"hidden_size": 128, "vocab_size": 5000},
        checkpoint={"extra_steps": list(range(6))},
    )
    step = jax.jit(lambda x: jax.tree.map(lambda a: a + jnp.ones([], a.dtype), x), donate_argnums=0)
    shape = like(config)
    state = random_state(shape, 0)
    with Checkpoints(config, shape) as run:
        run.restore_newest()
        for i in range(6):
            run.save(i, state, resume=False)
            state = step(state)
    for i in range(6):  # raises where the arrays are not those that were digested
        load(config, i)


ON_MESHES = """
import dataclasses, sys
sys.path.insert(0, sys.argv[2])
import jax, numpy as np
from checkpoint_runs import folder_of, like, load, random_state
from small_runs import assert_same_bits
from pythia_jax import configs
from pythia_jax.configs import MeshConfig
from pythia_jax.training.checkpoints import Checkpoints

config = configs.load(sys.argv[1])
def on(data, fsdp, tensor):
    mesh = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    return dataclasses.replace(config, mesh=mesh), jax.devices()[: data * fsdp * tensor]

first, devices = on(2, 2, 2)
shape = like(first, devices)
state = random_state(shape, 0)
cut = [x for x in jax.tree.leaves(state) if len({str(s.index) for s in x.addressable_shards}) == 4]
assert len(cut) > 10, "next to nothing was cut"
with Checkpoints(first, shape) as run:
    run.restore_newest()
    run.save(0, state, resume=True)
for sizes in [(1, 8, 1), (4, 1, 1), (1, 2, 2), (1, 1, 2), (1, 1, 1)]:
    other, devices = on(*sizes)
    shape = like(other, devices)
    with Checkpoints(other, shape) as run:
        step, found = run.restore_newest()
    assert_same_bits(found, state)
    for x, want in zip(jax.tree.leaves(found), jax.tree.leaves(shape), strict=True):
        assert x.sharding == want.sharding and x.dtype == want.dtype
assert_same_bits(load(config, 0).params, state.params)
print("equal on all")
"""


def test_saved_on_eight_devices_and_restored_on_other_meshes_all_bits_are_equal(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    config = make_config(model={"vocab_size": 96, "num_attention_heads": 4})
    configs.save(config, tmp_path / "run.yaml")
    command = [sys.executable, "-c", ON_MESHES, str(tmp_path / "run.yaml"), HERE]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.stdout == "equal on all\n", done.stderr


def test_surroundings_are_those_of_the_mesh(make_config: Make) -> None:
    config = make_config()
    save_steps(config, 0)
    about = checkpoints.read_about(folder_of(config) / "checkpoints" / "0")
    assert about["devices"] == 1 and about["processes"] == 1
    assert about["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1, "slices": 1}
    assert about["step"] == 0 and about["whole"] is True
    leaves = jax.tree.leaves(like(config))
    assert len(about["digests"]) == len(leaves)
    assert np.all([len(digest) == 16 for digest in about["digests"].values()])
