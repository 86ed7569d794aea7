"""Our model in the LM Evaluation Harness: every request as the harness's own `hf` answers it."""

import json
import os
import random
import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import lm_eval
import numpy as np
import pytest
import yaml
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from small_models import LINES, TEXT, random_model, trained_model, write_tasks

import pythia_jax as pj
from pythia_jax.evaluation import harness
from pythia_jax.evaluation import tasks as task_names
from pythia_jax.evaluation.questions import Questions
from pythia_jax.evaluation.scoring import Scorer

simple_evaluate: Any = lm_eval.simple_evaluate


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("tasks") / "local"
    return folder, write_tasks(folder)


@pytest.fixture(scope="module", params=[random_model, trained_model])
def model(request: pytest.FixtureRequest) -> pj.Model:
    return request.param()


def write_own_words(folder: Path, model: pj.Model) -> str:
    """A task of continuations that are the model's own, of one token each; its name."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    contexts = [" ".join(line.split(" ")[:n]) for line in LINES for n in range(3, 9)]
    prompts = [tokenizer.encode(context).ids for context in contexts]
    padded = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, ids in zip(padded, prompts, strict=True):
        row[: len(ids)] = ids
    logits = np.asarray(pj.forward(model.params, padded, model.config))
    rows = []
    for context, ids, row in zip(contexts, prompts, logits, strict=True):
        best = int(np.argmax(row[len(ids) - 1]))
        word = tokenizer.decode([best])
        # Some tokens are no text of their own, or another way to write it is shorter.
        if word and tokenizer.encode(context + word).ids == [*ids, best]:
            rows.append({"context": context, "word": word})
    assert rows
    name = f"own_words_{model.step}"
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = yaml.safe_load((folder / "last_words.yaml").read_text())
    task |= {"task": name, "target_delimiter": ""}
    task["dataset_kwargs"]["data_files"] = {"test": str(folder / f"{name}.jsonl")}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return name


@pytest.fixture(scope="module")
def both(model, tasks, tmp_path_factory) -> SimpleNamespace:
    """Results of ours and of `hf` on the exported folder."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    pj.save_hf(model, folder)
    local, names = tasks
    own = write_own_words(local, model)
    names = [*names, own]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISABLE_MULTIPROC", "1")
        theirs = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "dtype": "float32"},
            device="cpu",
            batch_size=3,
            tasks=names,
            task_manager=TaskManager(include_path=str(local), include_defaults=False),
            bootstrap_iters=harness.BOOTSTRAPS,
        )
    ours = harness.evaluate(model, names, include_path=local, log_samples=True)
    return SimpleNamespace(ours=ours, theirs=theirs, names=names, own=own)


def answers(results: dict, task: str) -> dict:
    """What was answered to each request of a task."""
    return {
        (sample["doc_id"], i): (sample["arguments"][i], answer[0])
        for sample in results["samples"][task]
        for i, answer in enumerate(sample["resps"])
    }


def test_every_request_is_answered_as_by_hf(both):
    greedy: dict[str, list[bool]] = {}
    for task in both.names:
        ours, theirs = answers(both.ours, task), answers(both.theirs, task)
        assert ours.keys() == theirs.keys() and (len(ours) >= len(LINES) or task == both.own)
        for key, (asked, answer) in theirs.items():
            assert ours[key][0] == asked
            score, flag = answer if isinstance(answer, tuple | list) else (answer, None)
            if isinstance(score, str):
                assert ours[key][1] == answer, (task, key)
                continue
            got = ours[key][1]
            score_of_ours, flag_of_ours = got if flag is not None else (got, None)
            assert abs(score_of_ours - score) <= max(1e-4, 1e-6 * abs(score)), (task, key)
            assert flag_of_ours == flag, (task, key)
            greedy.setdefault(task, []).append(bool(flag))
    assert all(greedy[both.own]) and False in greedy["last_words"]


def test_metrics_are_those_of_hf(both):
    for task in both.names:
        for metric, value in both.theirs["results"][task].items():
            if isinstance(value, float):
                assert both.ours["results"][task][metric] == pytest.approx(value, rel=1e-4)
    assert both.ours["versions"] == both.theirs["versions"]
    assert both.ours["n-shot"] == both.theirs["n-shot"]


def test_generations_of_a_trained_model_end_at_stop_strings(both):
    if both.ours["config"]["model_step"] is None:
        pytest.skip("a random model writes anything")
    made = [answer for _, answer in answers(both.ours, "lines").values()]
    assert all("\n" not in text and " and" not in text for text in made)
    assert any(text.strip() for text in made)


def test_results_say_which_model_was_scored(both, model):
    config = both.ours["config"]
    assert config["model_source"] == model.source and config["model_step"] == model.step
    assert config["model_dtype"] == "float32"
    sizes = [leaf.size for leaf in jax.tree.leaves(model.params)]
    assert config["model_num_parameters"] == sum(sizes)
    words = 2 * model.config.vocab_size * model.config.hidden_size
    assert config["non_embedding_parameters"] == sum(sizes) - words
    assert config["tokens_per_step"] is None  # not known of what we did not train


def test_tasks_read_once_are_asked_of_each_model_as_if_read_for_it(tasks):
    local, names = tasks
    questions = Questions(names, num_fewshot=2, include_path=local)
    for seed in (0, 1):
        np.random.seed(7)
        drawn = random.Random(7)
        random.seed(7)
        model = harness.PythiaJax(random_model(seed))
        shared = harness.ask(model, questions, log_samples=True)
        # What the caller draws is what it would have drawn.
        assert random.random() == drawn.random()
        assert np.random.random() == np.random.RandomState(7).random()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISABLE_MULTIPROC", "1")
        apart = simple_evaluate(
            model=harness.PythiaJax(random_model(1)),
            tasks=names,
            num_fewshot=2,
            task_manager=TaskManager(include_path=str(local), include_defaults=False),
            bootstrap_iters=harness.BOOTSTRAPS,
        )
    for key in ("results", "versions", "configs", "n-shot", "n-samples", "higher_is_better"):
        assert shared[key] == apart[key], key
    for task in names:
        asked = [sample["arguments"] for sample in apart["samples"][task]]
        assert [sample["arguments"] for sample in shared["samples"][task]] == asked
        assert answers(shared, task) == answers(apart, task)
    contexts = {sample["arguments"][0][0] for sample in apart["samples"]["letters_few_shot"]}
    assert len(contexts) == len(LINES) and all(c.count("How many?") == 3 for c in contexts)


def test_nothing_outside_is_asked_where_it_is(tasks, tmp_path, monkeypatch, capfd):
    local, _ = tasks
    monkeypatch.chdir(tmp_path)  # no git repository
    harness.evaluate(random_model(), "choices", include_path=local, limit=1)
    assert "git" not in capfd.readouterr().err


def instance(kind: str, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def lm() -> harness.PythiaJax:
    return harness.PythiaJax(random_model())


def test_a_cache_of_answers_is_filled_and_used(tasks, tmp_path, monkeypatch):
    local, names = tasks
    model = harness.PythiaJax(random_model())
    manager = TaskManager(include_path=str(local), include_defaults=False)
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")

    def evaluate() -> dict:
        return simple_evaluate(
            model=model, tasks=names, task_manager=manager, use_cache=str(tmp_path / "cache"),
            bootstrap_iters=0,
        )  # fmt: skip

    first = evaluate()
    (path,) = tmp_path.glob("cache*.db")
    with sqlite3.connect(path) as connection:
        (count,) = connection.execute("select count(*) from unnamed").fetchone()
    assert count > 30

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr(Scorer, "loglikelihoods", refuse)
    monkeypatch.setattr(Scorer, "greedy", refuse)
    again = evaluate()
    assert again["results"] == first["results"]


def test_an_empty_context_is_scored_after_the_end_of_a_document(lm):
    (empty,) = lm.loglikelihood([instance("loglikelihood", "", "The old")], disable_tqdm=True)
    ids = lm.tok_encode("The old")
    assert lm.scorer.loglikelihoods([([lm.eot_token_id], ids)]) == [empty]


def test_rows_or_tokens_make_no_difference(tasks):
    local, _ = tasks
    model = random_model()
    names = ["choices", "whole_texts"]
    by_tokens = harness.evaluate(model, names, include_path=local)
    by_rows = harness.evaluate(model, names, include_path=local, batch_size=5)
    for task, metrics in by_tokens["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                assert by_rows["results"][task][metric] == pytest.approx(value, rel=1e-5)


def test_limit_and_shots_reach_the_harness(tasks):
    local, _ = tasks
    found = harness.evaluate(
        random_model(), "choices,last_words", include_path=local, limit=3, num_fewshot=0
    )
    assert found["n-samples"]["choices"]["effective"] == 3
    assert found["n-shot"]["choices"] == 0 and set(found["results"]) == {"choices", "last_words"}
    assert "samples" not in found
    assert "|choices" in harness.table(found)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"do_sample": True, "temperature": 0.8}, "generates greedily"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"max_gen_toks": 96}, "leaves no room"),
    ],
)
def test_what_cannot_be_generated_is_refused_by_name(lm, settings, said):
    with pytest.raises(ValueError, match=said):
        lm.generate_until([instance("generate_until", "The", settings)], disable_tqdm=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"parallelize": True, "peft": "x"}, "does not have: parallelize, peft"),
        ({"batch_size": "many"}, "batch_size 'many'"),
        ({"batch_size": 0}, "batch_rows 0"),
        ({"max_length": 97}, "1 to 96"),
        ({"tokenizer": "/nowhere"}, "there is no"),
        ({"data": 3}, "does not fit"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(arguments, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        harness.PythiaJax(random_model(), **arguments)


def test_a_model_without_a_tokenizer_takes_one_by_name(tmp_path):
    whole = random_model()
    bare = pj.Model(whole.params, whole.config)
    with pytest.raises(ValueError, match="no tokenizer"):
        harness.PythiaJax(bare)
    (tmp_path / "tokenizer.json").write_bytes(whole.tokenizer_files["tokenizer.json"])
    named = harness.PythiaJax(bare, tokenizer=str(tmp_path))
    assert named.tok_encode(TEXT) == harness.PythiaJax(whole).tok_encode(TEXT)
    assert named.tokenizer_name == harness.PythiaJax(whole).tokenizer_name


def test_tasks_that_there_are_none_of_are_named_before_anything_runs(tasks):
    local, _ = tasks
    with pytest.raises(ValueError, match=r"does not have: no_such_task.*nor are they in"):
        harness.evaluate(random_model(), ["choices", "no_such_task"], include_path=local)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        harness.evaluate(random_model(), "choices", include_path=local / "not_there")


def test_the_command_line_is_the_harnesss_own(tasks, tmp_path, monkeypatch, capsys):
    local, _ = tasks
    monkeypatch.setattr(os, "fork", None)  # with a device held, that may never come back
    pj.save_hf(random_model(), tmp_path / "model")
    before = list(sys.argv)
    harness.run(
        ["run", "--model", "pythia_jax", "--model_args", f"pretrained={tmp_path / 'model'}",
         "max_length=90", "--tasks", "choices", "--include_path", str(local), "--limit", "2",
         "--max_batch_size", "8", "--output_path", str(tmp_path / "out"), "--log_samples"]
    )  # fmt: skip
    assert "|choices" in capsys.readouterr().out
    (path,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(path.read_text())
    alone = harness.evaluate(random_model(), "choices", include_path=local, limit=2)
    assert found["results"]["choices"]["acc,none"] == alone["results"]["choices"]["acc,none"]
    assert found["config"]["batch_size"] == "auto" and found["config"]["device"] == "cpu"
    assert len(list((tmp_path / "out").rglob("samples_choices_*.jsonl"))) == 1
    assert sys.argv == before


@pytest.fixture
def handed(monkeypatch) -> list[Any]:
    """What the harness's command line was handed, which then does nothing."""
    seen: list[Any] = []
    monkeypatch.setattr(harness.HarnessCLI, "execute", lambda self, args: seen.append(args))
    return seen


def test_the_preset_and_our_tasks_are_known_to_every_command(handed, tasks, tmp_path):
    local, _ = tasks
    config = tmp_path / "config.yaml"
    config.write_text(f"model: pythia_jax\ntasks: [pythia, mine]\ninclude_path: {local}\n")
    harness.run(["run", "--config", str(config)])
    harness.run(["validate", "--tasks", "pythia,piqa"])
    harness.run(["ls", "tasks", "--include_path", str(local)])
    run, validate, ls = handed
    assert run.tasks == [*task_names.PYTHIA, "mine"]
    assert validate.tasks == ",".join(task_names.PYTHIA)
    ours = str(task_names.TASKS_FOLDER)
    assert run.include_path == ls.include_path == [ours, str(local)]
    assert validate.include_path == [ours]
    assert run.batch_size == "auto"


def test_what_is_typed_goes_before_what_we_would_choose(handed):
    harness.run(["run", "--model", "pythia_jax", "--batch_size", "4", "--device", "tpu"])
    harness.run(["run", "--model", "hf", "--tasks", "piqa"])
    ours, theirs = handed
    assert (ours.batch_size, ours.device) == ("4", "tpu")
    assert not hasattr(theirs, "batch_size") and theirs.device is None
