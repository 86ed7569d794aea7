"""Runs: what they leave behind, and that going on is the same as never having stopped."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pythia_jax as pj
from pythia_jax import configs, data
from pythia_jax.configs import ConfigError, RunConfig
from pythia_jax.training import checkpoints, provenance, telemetry, trainer
from pythia_jax.training.checkpoints import Checkpoints
from pythia_jax.training.feed import read_ahead
from pythia_jax.training.telemetry import NonFiniteError, read_metrics
from pythia_jax.training.trainer import jitted_init, run_folder, train

TIMES = {"tokens_per_second", "step_time_s", "data_wait_s"}
Make = Callable[..., RunConfig]


def numbers(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def assert_same_bits(a: object, b: object) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(make_config: Make) -> None:
    straight = train(make_config("straight"), show_progress=False)
    cut = make_config("cut")
    for stop in (3, 11, 12, None):
        result = train(cut, stop_at=stop, show_progress=False)
    assert result.resumed_from == 12
    assert_same_bits(result.state, straight.state)
    assert numbers(result.folder) == numbers(straight.folder)
    for step in cut.checkpoint_steps:
        assert_same_bits(
            pj.load(result.folder, step=step).params, pj.load(straight.folder, step=step).params
        )


def test_a_run_folder_holds_what_the_documentation_says(make_config: Make) -> None:
    config = make_config()
    folder = train(config, show_progress=False).folder
    kept = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())
    assert kept == [0, 1, 2, 4, 5, 10, 15, 20]
    assert configs.load(folder / "config.yaml") == config
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")

    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(20))
    assert [line["step"] for line in lines if "validation_loss" in line] == [8, 16, 20]
    assert {"loss", "grad_norm", "learning_rate", "tokens_per_second", "data_wait_s"} <= set(
        lines[0]
    )
    assert lines[0]["learning_rate"] == 0.0
    events = EventAccumulator(str(folder / "events")).Reload()
    logged = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in logged] == list(range(20))
    assert logged[5][1] == pytest.approx(next(x for x in lines if x["step"] == 5)["loss"])


def test_the_first_step_changes_nothing_and_the_second_does(make_config: Make) -> None:
    folder = train(make_config(), stop_at=2, show_progress=False).folder
    zero, one, two = (pj.load(folder, step=step).params for step in (0, 1, 2))
    assert_same_bits(zero, one)
    assert not np.array_equal(one["embed_out"]["kernel"], two["embed_out"]["kernel"])


def test_training_goes_on_from_a_step_that_is_not_scheduled(make_config: Make) -> None:
    config = make_config()
    folder = train(config, stop_at=7, show_progress=False).folder
    assert [path.name for path in (folder / "resume").iterdir()] == ["7"]
    assert train(config, stop_at=9, show_progress=False).resumed_from == 7


def test_an_archive_of_parameters_still_resumes(make_config: Make) -> None:
    straight = train(make_config("straight"), show_progress=False)
    config = make_config("light", checkpoint={"archive": "params"})
    train(config, stop_at=10, show_progress=False)
    result = train(config, show_progress=False)
    assert result.resumed_from == 10
    assert_same_bits(result.state, straight.state)
    light, whole = (
        sum(f.stat().st_size for f in (r.folder / "checkpoints" / "20").rglob("*") if f.is_file())
        for r in (result, straight)
    )
    assert light < whole / 2
    assert_same_bits(pj.load(result.folder, step=5).params, pj.load(straight.folder, step=5).params)


def test_resume_states_are_saved_by_the_clock_and_few_are_kept(make_config: Make) -> None:
    config = make_config(checkpoint={"resume_every_minutes": 1e-9, "keep_resume": 2})
    folder = train(config, stop_at=19, show_progress=False).folder
    assert sorted(int(path.name) for path in (folder / "resume").iterdir()) == [18, 19]


def test_a_finished_run_is_left_as_it_is(make_config: Make) -> None:
    config = make_config()
    first = train(config, show_progress=False)
    before = numbers(first.folder)
    again = train(config, show_progress=False)
    assert again.resumed_from == 20
    assert numbers(again.folder) == before


def test_lines_beyond_the_restored_step_are_written_anew(make_config: Make) -> None:
    config = make_config()
    folder = train(config, stop_at=10, show_progress=False).folder
    path = folder / "metrics.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({"step": 10, "loss": 99.0}) + "\n")
        file.write('{"step": 11, "lo')  # what a killed process leaves
    train(config, show_progress=False)
    assert 99.0 not in [line.get("loss") for line in numbers(folder)]
    assert [line["step"] for line in numbers(folder) if "loss" in line] == list(range(20))


SURVIVE = """
import sys
from pythia_jax import configs
from pythia_jax.training.trainer import train
train(configs.load(sys.argv[1]), show_progress=False)
"""
KILLS = 2


def test_kill_9_at_any_moment_loses_only_steps_since_the_last_checkpoint(
    make_config: Make, tmp_path: Path
) -> None:
    # A state of 20 MB saved at every step: nearly always a write is under way.
    sections = {
        "model": {"hidden_size": 128, "vocab_size": 5000},
        "checkpoint": {"every": 1},
        "training": {"steps": 30},
    }
    straight = train(make_config("straight", **sections), show_progress=False)
    config = make_config("killed", **sections)
    configs.save(config, tmp_path / "killed.yaml")
    folder, draw = Path(config.checkpoint.directory), random.Random(0)
    command = [sys.executable, "-c", SURVIVE, str(tmp_path / "killed.yaml")]
    reached = 0
    for _ in range(KILLS):
        process = subprocess.Popen(command, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"})
        kill_in_a_write(process, folder, after=reached, draw=draw)
        assert unfinished(folder), "the kill fell into no write: the test proves nothing"
        complete = [int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit()]
        assert max(complete) >= reached
        reached = max(complete)
    result = train(config, show_progress=False)
    assert result.resumed_from == reached
    assert not unfinished(folder), "what was half-written is still there"
    for step in config.checkpoint_steps:
        saved = (pj.load(made.folder, step=step).params for made in (result, straight))
        assert_same_bits(*saved)
    assert_same_bits(result.state, straight.state)
    assert numbers(folder) == numbers(straight.folder)


def kill_in_a_write(
    process: subprocess.Popen, folder: Path, after: int, draw: random.Random
) -> None:
    """Kill -9 at some moment while a checkpoint beyond `after` is being written.

    However slow the machine is: the process is stopped first, to look where it stands, and let
    go on if no write is under way.
    """
    while process.poll() is None:
        if not writing(folder, after):
            time.sleep(0.002)
            continue
        time.sleep(draw.random() * 0.05)  # anywhere in the write
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        caught = writing(folder, after)
        process.send_signal(signal.SIGKILL if caught else signal.SIGCONT)
        if caught:
            process.wait()
            return
    pytest.fail(f"the run ended (status {process.returncode}) before a write could be hit")


def unfinished(folder: Path) -> list[Path]:
    places = folder / "checkpoints"
    return [p for p in places.iterdir() if not p.name.isdigit()] if places.is_dir() else []


def writing(folder: Path, after: int) -> bool:
    """Whether a checkpoint a few steps beyond `after` is being written."""
    return any(int(p.name.split(".")[0]) > after + 3 for p in unfinished(folder))


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


def test_switching_the_archive_half_way_erases_no_metrics(make_config: Make) -> None:
    folder = train(make_config(), stop_at=5, show_progress=False).folder
    before = numbers(folder)
    light = make_config(checkpoint={"archive": "params"})
    assert train(light, stop_at=6, show_progress=False).resumed_from == 5
    assert numbers(folder)[: len(before)] == before


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


def test_another_config_is_refused_and_the_run_is_left_alone(make_config: Make) -> None:
    train(make_config(), stop_at=2, show_progress=False)
    changed = make_config(data={"seed": 7}, training={"batch_size": 8})
    with pytest.raises(ConfigError, match=r"data\.seed was 1234, is 7.*training\.batch_size"):
        train(changed, show_progress=False)
    assert train(make_config(), stop_at=3, show_progress=False).resumed_from == 2


def test_another_validation_order_is_refused(make_config: Make) -> None:
    with run_folder(make_config()):
        pass
    with (
        pytest.raises(ConfigError, match=r"evaluation\.every was 8, is 4"),
        run_folder(make_config(evaluation={"every": 4})),
    ):
        pass


@pytest.mark.parametrize("content", ["", "{}", "model: [", "model: {hidden_size: 3", "\0"])
def test_a_damaged_config_of_a_run_is_told(make_config: Make, content: str) -> None:
    config = make_config()
    saved = Path(config.checkpoint.directory) / "config.yaml"
    with run_folder(config):
        pass
    saved.write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged"), run_folder(config):
        pass
    assert saved.read_text() == content


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_damaged_record_of_the_data_is_told(make_config: Make, content: str) -> None:
    config = make_config()
    with run_folder(config):
        pass
    (Path(config.checkpoint.directory) / "data.json").write_text(content)
    with pytest.raises(ConfigError, match=r"data\.json is damaged"), run_folder(config):
        pass


@pytest.mark.parametrize("split", ["train", "validation"])
def test_data_may_move_but_not_change(make_config: Make, tmp_path: Path, split: str) -> None:
    config = make_config()
    with run_folder(config):
        pass
    for suffix in (".bin", ".idx"):
        shutil.copy(tmp_path / f"corpus{suffix}", tmp_path / f"moved{suffix}")
    moved = make_config(data={split: [str(tmp_path / "moved")]})
    with run_folder(moved):
        pass
    assert configs.load(tmp_path / "run" / "config.yaml") == moved
    other = data.IndexedDatasetWriter(tmp_path / "moved", np.dtype(np.uint16))
    with other as writer:
        writer.add(np.zeros(5000, np.uint16))
    with pytest.raises(ConfigError, match=rf"other data: data\.{split}"), run_folder(moved):
        pass
    with run_folder(config):
        pass


def test_the_run_folder_takes_its_tokenizer_along(make_config: Make, tmp_path: Path) -> None:
    source = tmp_path / "elsewhere" / "tokenizer.json"
    source.parent.mkdir()
    source.write_text('{"a": 1}')
    of_file = dataclasses.replace(make_config(), tokenizer=str(source))
    of_folder = dataclasses.replace(make_config(), tokenizer=str(source.parent))
    copy = tmp_path / "run" / "tokenizer.json"
    for config in (of_file, of_folder):
        with run_folder(config):
            assert copy.read_text() == '{"a": 1}'
    source.write_text('{"a": 2}')
    with pytest.raises(ConfigError, match="another tokenizer"), run_folder(of_file):
        pass
    source.unlink()
    with run_folder(of_file):
        assert copy.read_text() == '{"a": 1}'


def test_a_missing_tokenizer_is_told_before_training(make_config: Make, tmp_path: Path) -> None:
    config = dataclasses.replace(make_config(), tokenizer=str(tmp_path / "gone.json"))
    with pytest.raises(ConfigError, match=r"tokenizer: .*gone\.json"):
        train(config, show_progress=False)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_two_runs_in_one_folder_are_refused(make_config: Make) -> None:
    config = make_config()
    with run_folder(config), pytest.raises(RuntimeError, match="another process"):
        train(config, show_progress=False)


def test_a_loss_that_is_no_number_stops_the_run_and_saves_nothing(
    make_config: Make,
) -> None:
    config = make_config(
        optimizer={"peak_learning_rate": 1e30, "min_learning_rate": 0.0, "warmup_fraction": 0.0}
    )
    with pytest.raises(NonFiniteError, match="step"):
        train(config, show_progress=False)
    folder = Path(config.checkpoint.directory)
    for path in (folder / "checkpoints").iterdir():
        params = pj.load(folder, step=int(path.name)).params
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_a_held_out_loss_that_is_no_number_stops_the_run(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(evaluation={"every": 4})
    monkeypatch.setattr(trainer, "held_out_loss", lambda *_: float("nan"))
    with pytest.raises(NonFiniteError, match=r"step 4: .*validation_loss"):
        train(config, show_progress=False)
    folder = Path(config.checkpoint.directory)
    assert "NaN" not in (folder / "metrics.jsonl").read_text()
    assert not (folder / "checkpoints" / "4").exists()


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


def test_a_stop_before_the_first_step_is_refused(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stop_at: -3 is no step"):
        train(make_config(), stop_at=-3, show_progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("extra_steps", [[0], []])
def test_a_run_may_stop_at_step_0(make_config: Make, extra_steps: list[int]) -> None:
    config = make_config(checkpoint={"extra_steps": extra_steps})
    result = train(config, stop_at=0, show_progress=False)
    assert (result.step, result.resumed_from) == (0, None)
    assert train(config, stop_at=0, show_progress=False).resumed_from == 0


def test_a_run_without_a_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="model: missing"):
        train(configs.from_dict({}), show_progress=False)


def test_other_surroundings_are_told(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config()
    train(config, stop_at=2, show_progress=False)
    with caplog.at_level("INFO", "pythia_jax"):
        train(config, stop_at=3, show_progress=False)
    assert "bit for bit" in caplog.text
    real = provenance.surroundings
    monkeypatch.setattr(provenance, "surroundings", lambda c: {**real(c), "cores": 77})
    with caplog.at_level("WARNING", "pythia_jax"):
        train(config, stop_at=4, show_progress=False)
    assert "equal to rounding only" in caplog.text and "-> 77" in caplog.text


def test_surroundings_are_the_runtime_the_mesh_and_the_cores(make_config: Make) -> None:
    now = provenance.surroundings(make_config())
    assert now == json.loads(json.dumps(now)), "it must come back from a checkpoint as it went"
    assert now["runtime"]["dtype"] == "float32" and now["runtime"]["remat"] == "none"
    assert now["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1, "slices": 1}
    assert len(now["cpus"]) == now["cores"]
    changed = partial(provenance.changed_surroundings, now)
    assert changed(now) == []
    assert changed({**now, "cpus": [90]}) == []
    assert changed({**now, "cores": 77}) == [f"cores {now['cores']} -> 77"]
    other = provenance.surroundings(make_config(training={"remat": "full", "attention": "einsum"}))
    assert changed(other) == [
        "runtime.attention auto -> einsum",
        "runtime.remat none -> full",
    ]


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


def test_a_step_that_is_not_there_is_named(make_config: Make) -> None:
    folder = train(make_config(), stop_at=2, show_progress=False).folder
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 3; there are 0, 1, 2"):
        pj.load(folder, step=3)


def test_held_out_batches_of_an_evaluation_follow_those_before(make_config: Make) -> None:
    from pythia_jax.training.trainer import held_out_loss, jitted_init, jitted_loss

    config = make_config()
    params, batches = jitted_init(config).params, data.batches(config, "validation")
    for step, first in ((8, 0), (16, 2), (20, 4)):
        expected = np.mean(
            [float(jitted_loss(params, batches[i], config=config)) for i in (first, first + 1)]
        )
        assert held_out_loss(params, config, batches, step) == pytest.approx(expected, abs=1e-6)


def test_batches_read_ahead_are_the_batches(make_config: Make) -> None:
    batches = data.batches(make_config())
    for step, tokens in zip(range(6, 20), read_ahead(batches, 6, 20), strict=True):
        np.testing.assert_array_equal(tokens, batches[step])
    assert list(read_ahead(batches, 20, 20)) == []


def test_a_cut_off_line_is_dropped_from_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 2.0}\n{"st')
    telemetry.drop_lines_from(path, 1)
    assert path.read_text() == '{"step": 0, "loss": 1.0}\n'
