"""Scores while a run trains: those of its checkpoints, in its folder and among its metrics."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from swept import make_config, write_task

import pythia_jax as pj
from launch.local_pod import run_pod
from pythia_jax import configs
from pythia_jax.bridge.revisions import weights_hash
from pythia_jax.configs import ConfigError, RunConfig
from pythia_jax.evaluation import results
from pythia_jax.evaluation.in_training import FOLDER, evaluator, scores
from pythia_jax.evaluation.scored import Request, alone_in
from pythia_jax.evaluation.sweep import sweep
from pythia_jax.evaluation.tasks import PYTHIA
from pythia_jax.training.records import read_metrics
from pythia_jax.training.trainer import train


@pytest.fixture(autouse=True, scope="module")
def datasets_stay_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    write_task(home / "tasks")
    return home


def make(home: Path, name: str, **evaluation: Any) -> RunConfig:
    values = {
        "tasks": ["animals"],
        "include_path": str(home / "tasks"),
        "steps": 0,
        **evaluation,
    }
    return make_config(home, name, evaluation=values)


@pytest.fixture(scope="module")
def trained(home: Path) -> RunConfig:
    """A run of six steps, scored at checkpoints 0, 1, 3, 6."""
    config = make(home, "whole")
    train(config, evaluate=evaluator(config), show_progress=False)
    return config


def place(config: RunConfig) -> Path:
    return Path(config.checkpoint.directory)


def files(config: RunConfig) -> dict[int, dict[str, Any]]:
    """Step → scores, of the files in the run folder."""
    found = {}
    for path in (place(config) / FOLDER).rglob("*.json"):
        content = json.loads(path.read_bytes())
        found[content[results.PROVENANCE]["step"]] = content["results"]["animals"]
    return found


def lines(config: RunConfig) -> dict[int, dict[str, float]]:
    """Step → the line with scores."""
    metrics = read_metrics(place(config) / "metrics.jsonl")
    found = [line for line in metrics if any(key.startswith("evals/") for key in line)]
    assert len(found) == len({line["step"] for line in found})
    return {int(line["step"]): line for line in found}


def test_scores_lie_in_the_run_folder_and_among_the_metrics(trained: RunConfig) -> None:
    assert sorted(files(trained)) == [0, 1, 3, 6]
    assert sorted(lines(trained)) == [0, 1, 3, 6]
    for step, found in files(trained).items():
        line = lines(trained)[step]
        assert {key for key in line if key != "step"} == {
            "evals/animals/acc",
            "evals/animals/acc_norm",
        }
        assert line["evals/animals/acc"] == found["acc"]
    assert {point.step for point in results.read([place(trained) / FOLDER])} == {0, 1, 3, 6}


def test_a_sweep_of_the_checkpoints_gives_the_same(
    trained: RunConfig, home: Path, tmp_path: Path, counted: list[Any]
) -> None:
    how: dict[str, Any] = {
        "tasks": ["animals"],
        "include_path": str(home / "tasks"),
        "show_progress": False,
    }
    done = sweep(str(place(trained)), out=tmp_path, **how)
    assert sorted(done.written) == [0, 1, 3, 6] and len(counted) == 4
    for step, path in done.written.items():
        assert json.loads(path.read_bytes())["results"]["animals"] == files(trained)[step]
    there = sweep(str(place(trained)), out=place(trained) / FOLDER, **how)
    assert sorted(there.skipped) == [0, 1, 3, 6] and len(counted) == 4


def test_scoring_changes_no_bit_of_the_run(trained: RunConfig, home: Path) -> None:
    plain = make(home, "plain", tasks=[])
    assert evaluator(plain) is None
    train(plain, show_progress=False)
    losses = [
        [line["loss"] for line in read_metrics(place(config) / "metrics.jsonl") if "loss" in line]
        for config in (trained, plain)
    ]
    assert len(losses[0]) == 6 and losses[0] == losses[1]


def test_a_run_that_goes_on_scores_the_same_weights_once(
    trained: RunConfig, home: Path, counted: list[Any]
) -> None:
    config = make(home, "halted", tasks_every=2)
    train(config, evaluate=evaluator(config), stop_at=4, show_progress=False)
    assert sorted(files(config)) == [0, 2, 4] and len(counted) == 3
    before = files(config)
    train(config, evaluate=evaluator(config), show_progress=False)
    assert sorted(files(config)) == [0, 2, 4, 6] and len(counted) == 4
    assert {step: files(config)[step] for step in before} == before
    assert sorted(lines(config)) == [0, 2, 4, 6]
    assert files(config)[6] == files(trained)[6]


def test_the_command_scores_as_it_trains(home: Path, tmp_path: Path) -> None:
    config = make(home, "typed", tasks_every=6)
    configs.save(config, tmp_path / "run.yaml")
    ran = run("train", tmp_path / "run.yaml", "--evaluation.limit", 2)
    assert ran.exit_code == 0, ran.output
    assert sorted(files(config)) == [0, 6]


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"tasks": [","]}, "evaluation.tasks: no task is named"),
        ({"tasks_every": -1}, "evaluation.tasks_every: -1"),
        ({"num_fewshot": -1}, "evaluation.num_fewshot: -1"),
        ({"limit": 0}, "evaluation.limit: 0"),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    home: Path, evaluation: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluator(make(home, "refused", **evaluation))
    assert not (home / "refused").exists()


def test_tasks_without_a_tokenizer_or_what_scores_them_are_refused(home: Path) -> None:
    config = make(home, "refused")
    with pytest.raises(ConfigError, match=r"train\(\) itself scores no tasks"):
        train(config, show_progress=False)
    silent = configs.from_dict({**configs.to_dict(config), "tokenizer": None})
    with pytest.raises(ConfigError, match="the run has no tokenizer"):
        evaluator(silent)
    assert not (home / "refused").exists()


def test_scores_are_finite_numbers_by_task_and_metric() -> None:
    found = {
        "results": {
            "wikitext": {
                "alias": "wikitext",
                "sample_len": 4,
                "word_perplexity,none": float("inf"),
                "byte_perplexity,none": 3.5,
                "byte_perplexity_stderr,none": "N/A",
            },
            "gsm": {"exact_match,strict": 0.25, "exact_match_stderr,strict": 0.1},
        }
    }
    assert scores(found) == {
        "evals/wikitext/byte_perplexity": 3.5,
        "evals/gsm/exact_match,strict": 0.25,
    }


def test_help_says_what_goes_to_the_harness() -> None:
    shown = run("evaluate", "--help").output
    assert "evaluate run --model pythia_jax" in shown and "--num-fewshot" in shown


@pytest.mark.slow
def test_several_processes_score_as_one(trained: RunConfig, home: Path) -> None:
    config = make(home, "pod", tasks_every=6)
    path = home / "pod.yaml"
    configs.save(config, path)
    command = [sys.executable, "-m", "pythia_jax", "train", "--pod", str(path)]
    for _ in range(2):  # the second time there is nothing left to do
        ran = run_pod(command, 2, devices_per_process=1)
        assert ran.status == 0, ran.output
        assert sorted(files(config)) == sorted(lines(config)) == [0, 6]
    for name, value in files(trained)[0].items():
        assert files(config)[0][name] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("typed", ["animals,plants", "animals, plants", ["animals", "plants"]])
def test_tasks_are_a_list_or_text_with_commas(home: Path, typed: Any) -> None:
    config = make(home, "refused", tasks=typed)
    write_task(home / "tasks", "plants")
    assert Request(config.evaluation.tasks).names == ["animals", "plants"]
    assert configs.from_dict(configs.to_dict(config)) == config
    changed = configs.overridden(configs.to_dict(config), {"evaluation.tasks": "pythia"}, "here")
    assert Request(changed.evaluation.tasks).names == list(PYTHIA)


def test_a_fuller_file_of_the_same_weights_stays_and_that_is_told_once(
    trained: RunConfig, home: Path, counted: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    before = {path: path.read_bytes() for path in (place(trained) / FOLDER).rglob("*.json")}
    asked = dataclasses.replace(trained.evaluation, limit=2)
    evaluate = evaluator(dataclasses.replace(trained, evaluation=asked))
    assert evaluate is not None
    for step in (0, 3):
        params = pj.load(place(trained), step=step).params
        assert set(evaluate(params, step, place(trained))) == {
            "evals/animals/acc",
            "evals/animals/acc_norm",
        }
    assert len(counted) == 2
    assert {path: path.read_bytes() for path in before} == before
    told = [r.getMessage() for r in caplog.records if "scores go to metrics.jsonl alone" in r.msg]
    assert len(told) == 1 and "on all questions of each task, not the first 2" in told[0]


def test_a_file_of_other_weights_is_written_over(
    trained: RunConfig, home: Path, tmp_path: Path
) -> None:
    (path,) = (place(trained) / FOLDER).rglob("*_step3.json")
    evaluate = evaluator(trained)
    assert evaluate is not None
    file = tmp_path / path.relative_to(place(trained))
    file.parent.mkdir(parents=True)
    file.write_bytes(path.read_bytes())
    params = pj.load(place(trained), step=6).params
    evaluate(params, 3, tmp_path)
    found = json.loads(file.read_bytes())[results.PROVENANCE]
    assert found["weights"] == weights_hash(params)


def test_a_run_writes_nothing_where_a_sweep_is_at_work(
    trained: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluate = evaluator(trained)
    assert evaluate is not None
    params = pj.load(place(trained), step=6).params
    of = tmp_path / FOLDER / "whole" / "zero-shot"
    with alone_in(of):
        assert evaluate(params, 6, tmp_path)["evals/animals/acc"] == files(trained)[6]["acc"]
    assert not list(of.glob("*.json")) and "another sweep" in caplog.text
    evaluate(params, 6, tmp_path)
    assert [path.name for path in of.glob("*.json")] == ["whole_step6.json"]


def test_rows_that_cannot_be_read_end_a_run_before_it_begins(home: Path) -> None:
    write_task(home / "gone", "gone")
    (home / "gone" / "gone.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        evaluator(make(home, "refused", tasks=["gone"], include_path=str(home / "gone")))
    assert not (home / "refused").exists()
