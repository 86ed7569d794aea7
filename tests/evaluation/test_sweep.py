"""Sweeps: each checkpoint as it is scored alone, nothing twice, nothing compiled again."""

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml
from command_line import refused, run
from swept import write_run, write_task

import pythia_jax as pj
from pythia_jax import suite
from pythia_jax.bridge.revisions import chosen, source_of, weights_hash
from pythia_jax.evaluation import results, scored
from pythia_jax.evaluation.sweep import sweep
from pythia_jax.files import locked
from pythia_jax.training.checkpoints import step_folders

sys.path.append(str(Path(__file__).parents[1] / "bridge"))
from hub_server import HubServer, hub_server  # type: ignore[import-not-found]

STEPS = (0, 1, 3, 6)
TIMINGS = ("seconds",)
"""What two files of the same scores may differ in."""


@pytest.fixture(autouse=True, scope="module")
def datasets_stay_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The harness reads its local tasks through a library that keeps copies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, `tiny`, and a folder of task files, `tasks`: animals, plants."""
    home = tmp_path_factory.mktemp("home")
    write_run(home, STEPS)
    write_task(home / "tasks")
    write_task(home / "tasks", "plants")
    return home


@dataclass
class Watched:
    """out: results of a sweep over all of the run, never interrupted. compiled, held: programs
    compiled so far, and sets of weights in memory, when each checkpoint had been scored."""

    out: Path
    compiled: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)


@pytest.fixture(scope="module")
def watched(home: Path) -> Watched:
    seen = Watched(home / "whole")
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: events.append(event)
    )
    ask = scored.ask

    def sets(like: jax.Array) -> int:
        gc.collect()
        return sum(array.shape == like.shape for array in jax.live_arrays())

    def watching(scorer: Any, questions: Any) -> dict[str, Any]:
        found = ask(scorer, questions)
        seen.compiled.append(sum("backend_compile" in event for event in events))
        time.sleep(0.5)  # for the next one to be loaded
        seen.held.append(sets(scorer.params["embed_in"]["embedding"]))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scored, "ask", watching)
        jax.clear_caches()
        done = sweep(str(home / "tiny"), out=seen.out, **asked(home))
    assert sorted(done.written) == list(STEPS) and not done.failed and not done.skipped
    return seen


@pytest.fixture
def whole(watched: Watched) -> Path:
    return watched.out


def asked(home: Path, **more: Any) -> dict[str, Any]:
    return {
        "tasks": ["animals"],
        "include_path": str(home / "tasks"),
        "show_progress": False,
        **more,
    }


def file_of(out: Path, step: int, name: str = "tiny") -> Path:
    return out / name / "zero-shot" / f"{name}_step{step}.json"


def content(path: Path) -> dict[str, Any]:
    """What a file of results holds, without timings."""
    found = json.loads(path.read_bytes())
    for key in TIMINGS:
        del found[results.PROVENANCE][key]
    return found


def test_every_checkpoint_scores_as_it_does_alone(home: Path, whole: Path, tmp_path: Path) -> None:
    seen = set()
    for step in STEPS:
        ran = run(
            "evaluate", home / "tiny", "--step", step, "--tasks", "animals", "--include-path",
            home / "tasks", "--out", tmp_path, "--batch-size", 3,
        )  # fmt: skip
        assert ran.exit_code == 0, ran.output
        assert "|animals|" in ran.output.replace(" ", "")
        alone, swept = content(file_of(tmp_path, step)), content(file_of(whole, step))
        # By other batches: the choices, of weights that are far apart, are the same.
        assert alone["results"] == swept["results"]
        assert {"acc", "acc_norm"} <= set(swept["results"]["animals"])
        assert alone[results.PROVENANCE]["weights"] == swept[results.PROVENANCE]["weights"]
        seen.add(swept[results.PROVENANCE]["weights"])
    assert len(seen) == len(STEPS)


def test_results_are_of_the_weights_that_they_name(home: Path, whole: Path) -> None:
    for step in STEPS:
        found = content(file_of(whole, step))[results.PROVENANCE]
        assert found["weights"] == weights_hash(pj.load(home / "tiny", step=step).params)
        assert found["source"] == f"{home.resolve() / 'tiny'} step {step}"
        assert (found["step"], found["tasks"], found["limit"]) == (step, ["animals"], None)
        assert found["tokens_per_step"] == 4 * 32
        assert found["parameters"] == 2 * (12 * 32**2 + 13 * 32) + 2 * 32


def test_files_say_how_they_came_as_the_harness_would_take_it(home: Path, whole: Path) -> None:
    for step in STEPS:
        found = content(file_of(whole, step))
        config, provenance = found["config"], found[results.PROVENANCE]
        assert config["model_args"] == f"pretrained={home.resolve() / 'tiny'},step={step}"
        assert (config["batch_size"], config["device"]) == ("auto", "cpu")
        said = dict(part.split("=") for part in config["model_args"].split(","))
        again = pj.load(said["pretrained"], step=int(said["step"]))
        assert provenance["weights"] == weights_hash(again.params)
        assert (provenance["dtype"], provenance["devices"]) == ("float32", jax.device_count())
        assert provenance["task_hashes"].keys() == {"animals"}


def test_a_second_sweep_scores_nothing(home: Path, whole: Path, counted: list[Any]) -> None:
    before = {step: file_of(whole, step).stat().st_mtime_ns for step in STEPS}
    done = sweep(str(home / "tiny"), out=whole, **asked(home))
    assert sorted(done.skipped) == list(STEPS) and not done.written and not counted
    assert before == {step: file_of(whole, step).stat().st_mtime_ns for step in STEPS}


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pythia_jax.evaluation import scored
from pythia_jax.evaluation.sweep import sweep
ask, calls = scored.ask, []

def deadly(*asked):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return ask(*asked)

scored.ask = deadly
run, out, tasks = sys.argv[2:]
sweep(run, out=out, tasks=["animals"], include_path=tasks, show_progress=False)
"""


def test_a_killed_sweep_goes_on_and_scores_nothing_twice(
    home: Path, whole: Path, tmp_path: Path, counted: list[Any]
) -> None:
    package = str(Path(pj.__file__).parents[1])
    arguments = [package, str(home / "tiny"), str(tmp_path), str(home / "tasks")]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    before = {step: file_of(tmp_path, step).stat().st_mtime_ns for step in STEPS[:2]}
    assert not any(file_of(tmp_path, step).exists() for step in STEPS[2:])
    done = sweep(str(home / "tiny"), out=tmp_path, **asked(home))
    assert (sorted(done.skipped), sorted(done.written)) == ([0, 1], [3, 6]) and len(counted) == 2
    assert before == {step: file_of(tmp_path, step).stat().st_mtime_ns for step in STEPS[:2]}
    for step in STEPS:
        assert content(file_of(tmp_path, step)) == content(file_of(whole, step))
    assert {p.name for p in tmp_path.rglob("*.*") if p.is_file()} == {
        ".sweep.lock",
        *(f"tiny_step{step}.json" for step in STEPS),
    }


INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what runs in the background
sys.path.insert(0, sys.argv.pop(1))
from pythia_jax.cli import main
from pythia_jax.evaluation import scored
ask, calls = scored.ask, []

def stopped(*asked):
    calls.append(1)
    if len(calls) == 2:
        signal.raise_signal(signal.SIGINT)
    return ask(*asked)

scored.ask = stopped
main()
"""


def test_ctrl_c_ends_a_sweep_in_one_line(home: Path, tmp_path: Path) -> None:
    package = str(Path(pj.__file__).parents[1])
    words = ["sweep", home / "tiny", "--out", tmp_path, "--tasks", "animals", "--include-path"]
    stopped = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, package, *map(str, words), str(home / "tasks")],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert stopped.returncode == 130 and stopped.stderr.rstrip().endswith("Interrupted")
    assert "Traceback" not in stopped.stderr
    assert [path.name for path in tmp_path.rglob("*.json")] == ["tiny_step0.json"]


def test_nothing_is_compiled_after_the_first_checkpoint(watched: Watched) -> None:
    assert watched.compiled[0] > 0 and watched.compiled == [watched.compiled[0]] * len(STEPS)


def test_two_sets_of_weights_are_held_at_most(watched: Watched) -> None:
    assert watched.held == [2, 2, 2, 1]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("steps", [0, 1, 3, 6]),
        ("3,0", [0, 3]),
        ("1, 6,1", [1, 6]),
        ("0:6", [0, 1, 3]),
        ("0:7:3", [0, 3, 6]),
        ("1,3:7", [1, 3, 6]),
    ],
)
def test_revisions_are_steps_and_half_open_ranges(home: Path, text: str, steps: list[int]) -> None:
    assert chosen(text, source_of(str(home / "tiny"))) == steps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("main", "'main' of 'main' is no step"),
        ("0,1:", "'1:' of"),
        ("-1", "'-1' of"),
        ("0:6:0", "cannot go on by 0 steps"),
        ("7:9", "no checkpoint at '7:9'"),
        ("0,2,5", "no checkpoint of step 2, 5; there are 0, 1, 3, 6"),
        ("0:6:2", "no checkpoint of step 2, 4; there are"),
    ],
)
def test_revisions_that_are_none_are_refused_before_anything_is_scored(
    home: Path, tmp_path: Path, counted: list[Any], text: str, message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sweep(str(home / "tiny"), out=tmp_path / "out", revisions=text, **asked(home))
    assert not counted and not (tmp_path / "out").exists()


def test_a_file_of_other_scores_is_refused_before_anything_is_scored(
    home: Path, whole: Path, tmp_path: Path, counted: list[Any]
) -> None:
    tiny = str(home / "tiny")
    with pytest.raises(ValueError, match=r"tiny_step0\.json: holds no scores on plants; choose"):
        sweep(tiny, out=whole, **asked(home, tasks=["animals", "plants"]))
    with pytest.raises(ValueError, match="holds scores on all questions of each task, not the fir"):
        sweep(tiny, out=whole, **asked(home, limit=2))
    other = write_run(tmp_path, (0, 2))
    with pytest.raises(ValueError, match=r"tiny_step0\.json: holds scores of other weights, of /"):
        file = results.path_of(tmp_path / "out", model_name="tiny", step=0)
        file.parent.mkdir(parents=True)
        changed = content(file_of(whole, 3))
        file.write_text(json.dumps(changed))
        sweep(str(other), out=tmp_path / "out", **asked(home))
    file.write_text('{"results": {}, "versions": {}, "config": {}}')
    with pytest.raises(ValueError, match="was not written by a sweep"):
        sweep(str(other), out=tmp_path / "out", **asked(home))
    assert not counted


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"metadata": {"version": 2}}, r"animals was of version Yaml, is of 2;"),
        ({"doc_to_text": "{{query}}?"}, "the task file of animals says something else now"),
        ({"rows": 3}, "the rows of animals are others now"),
        ({}, ""),
    ],
)
def test_scores_on_other_questions_are_refused_wherever_these_lie(
    home: Path, whole: Path, tmp_path: Path, changed: dict[str, Any], message: str,
    counted: list[Any],
) -> None:  # fmt: skip
    folder = write_task(tmp_path / "elsewhere")
    rows = (folder / "animals.jsonl").read_text().splitlines(keepends=True)
    (folder / "animals.jsonl").write_text("".join(rows[: changed.get("rows", len(rows))]))
    task = yaml.safe_load((folder / "animals.yaml").read_text())
    task |= {key: value for key, value in changed.items() if key != "rows"}
    (folder / "animals.yaml").write_text(yaml.safe_dump(task))
    how = asked(home, include_path=str(folder))
    if message:
        with pytest.raises(ValueError, match=f"tiny_step0.*on other questions: {message}"):
            sweep(str(home / "tiny"), out=whole, **how)
    else:
        assert sorted(sweep(str(home / "tiny"), out=whole, **how).skipped) == list(STEPS)
    assert not counted


def test_a_run_that_was_moved_is_still_known_by_its_weights(
    home: Path, whole: Path, tmp_path: Path, counted: list[Any]
) -> None:
    (tmp_path / "elsewhere").symlink_to(home / "tiny")
    done = sweep(str(tmp_path / "elsewhere"), out=whole, **asked(home))
    assert sorted(done.skipped) == list(STEPS) and not counted


def test_two_sweeps_do_not_write_into_one_folder(home: Path, whole: Path) -> None:
    folder = file_of(whole, 0).parent
    with (
        locked(folder / ".sweep.lock"),
        pytest.raises(BlockingIOError, match=r"another sweep, or a run that .* is writing there"),
    ):
        sweep(str(home / "tiny"), out=whole, **asked(home))


def test_other_numbers_of_examples_lie_beside_each_other(home: Path, tmp_path: Path) -> None:
    done = sweep(str(home / "tiny"), out=tmp_path, revisions="6", **asked(home, num_fewshot=2))
    assert done.written[6].parent.name == "two-shot"
    (found,) = results.read([tmp_path])
    assert (found.step, found.num_fewshot) == (6, 2)


def test_a_checkpoint_that_cannot_be_loaded_is_passed_over_and_told(
    tmp_path: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = write_run(tmp_path, (0, 1, 2))
    for path in step_folders(tiny)[1].rglob("*"):
        if path.parent.name == "d":
            path.write_bytes(os.urandom(len(path.read_bytes())))
    arguments = (
        "sweep", tiny, "--tasks", "animals", "--include-path", home / "tasks", "--out",
        tmp_path / "out",
    )  # fmt: skip
    ran = run(*arguments)
    assert ran.exit_code == 1 and "step 1 was not scored: " in ran.output
    assert f"2 checkpoints scored: results are in {tmp_path}/out/tiny/zero-shot" in ran.output
    assert sorted(p.name for p in (tmp_path / "out").rglob("*.json")) == [
        "tiny_step0.json",
        "tiny_step2.json",
    ]


# The hub.


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_server(tmp_path / "hub") as running:
        running.use(monkeypatch, tmp_path / "cache")
        yield running


def put(server: HubServer, home: Path, folder: Path, repo: str, step: int, of: int) -> None:
    if not folder.is_dir():
        pj.save_hf(pj.load(home / "tiny", step=of), folder)
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".md"}
    server.add(repo, f"step{step}", files)
    server.add(repo, "main", files)


def test_revisions_of_the_hub_are_swept(
    server: HubServer,
    home: Path,
    whole: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for step in (0, 1, 3):
        # Step 1 has the weights of step 0, as in all of Pythia.
        put(server, home, tmp_path / f"hf{step}", "someone/tiny", step, 0 if step == 1 else step)
    server.add("someone/tiny", "step6", {"config.json": b"{}"})
    with caplog.at_level(logging.WARNING, logger="pythia_jax"):
        done = sweep("someone/tiny", out=tmp_path / "out", **asked(home))
    assert sorted(done.written) == [0, 1, 3]
    assert list(done.failed) == [6] and "revision step6 has no weights" in done.failed[6]
    assert "step0 and step1 hold the same weights, as in all of Pythia" in caplog.text
    for step, same in ((0, 0), (1, 0), (3, 3)):
        found, theirs = content(file_of(tmp_path / "out", step)), content(file_of(whole, same))
        assert found["results"] == theirs["results"]
        assert found[results.PROVENANCE]["source"] == f"someone/tiny step{step}"
        assert found["config"]["model_args"] == f"pretrained=someone/tiny,revision=step{step}"
    again = sweep("someone/tiny", out=tmp_path / "out", revisions="0:6", **asked(home))
    assert sorted(again.skipped) == [0, 1, 3] and not again.written


def test_known_faults_of_revisions_are_told_and_kept(
    server: HubServer, home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(server, home, tmp_path / "hf", "EleutherAI/pythia-12b", 50_000, 3)
    with caplog.at_level(logging.WARNING, logger="pythia_jax"):
        done = sweep("12b", out=tmp_path / "out", revisions="50000", **asked(home))
    fault = suite.bad_revision("pythia-12b", 50_000)
    assert fault is not None and f"EleutherAI/pythia-12b step50000: {fault}" in caplog.text
    path = tmp_path / "out" / "pythia-12b" / "zero-shot" / "12b_step50000.json"
    assert done.written == {50_000: path}
    assert content(path)[results.PROVENANCE]["known_fault"] == fault


# The commands.


def test_one_checkpoint_is_no_sweep(home: Path, tmp_path: Path) -> None:
    pj.save_hf(pj.load(home / "tiny"), tmp_path / "hf")
    message = refused("sweep", tmp_path / "hf", "--tasks", "animals", "--out", tmp_path / "out")
    assert "holds one checkpoint, and many are gone through here: give a run folder" in message
    assert message == refused("audit", tmp_path / "hf")
    message = refused("sweep", tmp_path / "nothing", "--tasks", "sciq", "--out", tmp_path / "out")
    assert "there is no such folder" in message


def test_a_file_that_is_there_is_not_written_over(home: Path, whole: Path) -> None:
    before = file_of(whole, 6).read_bytes()
    message = refused(
        "evaluate", home / "tiny", "--tasks", "animals", "--include-path", home / "tasks", "--out",
        whole,
    )  # fmt: skip
    assert "tiny_step6.json: is there already" in message
    assert file_of(whole, 6).read_bytes() == before


def test_a_task_that_is_none_is_named(home: Path, tmp_path: Path) -> None:
    message = refused(
        "sweep", home / "tiny", "--tasks", "animalz", "--include-path", home / "tasks", "--out",
        tmp_path / "out",
    )  # fmt: skip
    assert "animalz" in message
    assert not (tmp_path / "out").exists()


def test_run_ls_and_validate_go_to_the_harness_as_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    from pythia_jax.evaluation import harness

    typed: list[list[str]] = []
    monkeypatch.setattr(harness, "run", lambda argv: typed.append(list(argv)))
    for words in (
        ["run", "--model", "pythia_jax", "--model_args", "pretrained=x", "--help"],
        ["ls", "tasks"],
        ["validate", "--tasks", "a b"],
    ):
        assert run("evaluate", *words).exit_code == 0
        assert typed.pop() == words
    assert "Missing option '--tasks'" in refused("evaluate", "./run")
