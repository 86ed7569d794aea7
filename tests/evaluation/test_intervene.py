"""An intervention: the base run in everything but the batches, and those as they should be."""

import dataclasses
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import bpe
import click
import numpy as np
import pytest
from command_line import refused, run

import pythia_jax as pj
from pythia_jax import configs, data
from pythia_jax.bridge import hf_out, run_in
from pythia_jax.bridge.convert import open_any
from pythia_jax.cli import main
from pythia_jax.cli.intervene import intervene as command
from pythia_jax.configs import ConfigError, RunConfig
from pythia_jax.data import tokenize_texts
from pythia_jax.evaluation.intervene import intervene, of_base
from pythia_jax.evaluation.pronouns import PADDING
from pythia_jax.training.stored import read_about
from pythia_jax.training.telemetry import read_metrics
from pythia_jax.training.trainer import train

main.add_command(command)

CUT, LAST, WIDTH = 4, 8, 33
TEXTS = [
    f"{name} said that he was here , and {other} saw him with his dog . "
    f"He was not{' , but she was' * times} . So it goes with {name} ."
    for name in ("Ada", "Ben", "Cleo")
    for other in ("Dan", "Eve")
    for times in (1, 7)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> RunConfig:
    """A run of 8 steps over texts with pronouns, trained, with whole states of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = bpe.small(TEXTS, size=300)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenize_texts(TEXTS * 3, folder / "corpus", tokenizer, append_eod=True, workers=1)
    config = configs.from_dict(
        {
            "name": "base",
            "model": {
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "vocab_size": 304,
                "max_position_embeddings": WIDTH - 1,
            },
            "data": {
                "train": [str(folder / "corpus")],
                "validation": [str(folder / "corpus")],
                "sequence_length": WIDTH - 1,
            },
            "tokenizer": str(folder / "tokenizer.json"),
            "optimizer": {"peak_learning_rate": 1e-2, "warmup_fraction": 0.1},
            "training": {"steps": LAST, "batch_size": 6, "precision": "float32", "remat": "none"},
            "checkpoint": {"directory": str(folder / "run"), "every": CUT, "extra_steps": []},
            "evaluation": {"every": 4, "steps": 1},
            "logging": {"every": 1},
        }
    )
    train(config, show_progress=False)
    return config


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The current folder with a module of transforms in it."""
    (tmp_path / "my_interventions.py").write_text(
        "def none(step, rows):\n    return rows\n"
        "def reversed(step, rows):\n    return rows[:, ::-1].copy()\n"
        "def failing(step, rows):\n    return rows[:, ::-1].copy() if step < 6 else rows[:, 1:]\n"
    )
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_interventions", None)


def folder_of(config: RunConfig) -> Path:
    return Path(config.checkpoint.directory)


def asked(base: RunConfig, out: Path, **flags: Any) -> list[object]:
    """The command, with flags in place of its usual ones."""
    flags = {
        "step": CUT,
        "until": LAST,
        "data": folder_of(base) / "config.yaml",
        "transform": "swap_pronouns",
        "out": out,
        **flags,
    }
    model = flags.pop("model", folder_of(base))
    options = [(f"--{key.replace('_', '-')}", value) for key, value in flags.items()]
    return ["intervene", model, *(part for option in options for part in option)]


def digests(folder: Path, step: int) -> dict[str, Any]:
    """Of every array of the whole state of a step."""
    kinds = (folder / kind / str(step) for kind in ("checkpoints", "resume"))
    about = read_about(next(path for path in kinds if path.is_dir()))
    assert about["whole"]
    return about["digests"]


def swapped(text: str) -> str:
    for word, other in (("he", "she"), ("him", "her"), ("his", "her")):
        for a, b in ((word, other), (word.capitalize(), other.capitalize())):
            text = text.replace(f" {a} ", f" {b} ")
    return text


def test_only_rows_with_a_pronoun_differ_and_only_from_the_start_on(base, tmp_path) -> None:
    tokenizer = data.load_tokenizer(str(base.tokenizer))
    result = run(*asked(base, tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert f"checkpoint {LAST}" in result.output
    saved = configs.load(tmp_path / "out" / "config.yaml")
    before, after = data.batches(base), data.batches(saved)
    both = 0
    for step in range(LAST):
        rows, changed = before[step], after[step]
        texts = [tokenizer.decode(row.tolist(), skip_special_tokens=False) for row in rows]
        wanted = [step >= CUT and swapped(text) != text for text in texts]
        assert np.any(rows != changed, axis=1).tolist() == wanted
        both += 0 < sum(wanted) < len(wanted)
    assert both  # rows of both kinds were there
    one, other = (data.batches(config, "validation")[1] for config in (base, saved))
    np.testing.assert_array_equal(one, other)


def kept_runs(tokenizer: Any, row: np.ndarray) -> list[list[int]]:
    """The tokens of a row before, between and after those that hold a part of a pronoun."""
    text = tokenizer.decode(row.tolist(), skip_special_tokens=False)
    words = [word for lower in ("he", "him", "his") for word in (lower, lower.capitalize())]
    spots = [m.span(1) for word in words for m in re.finditer(f" ({word}) ", text)]
    runs, end = [[]], 0
    for token in row.tolist():
        begin, end = end, end + len(tokenizer.decode([token], skip_special_tokens=False))
        if any(begin < stop and start < end for start, stop in spots):
            runs.append([])
        else:
            runs[-1].append(token)
    return runs


def test_rows_differ_only_around_each_swap_or_are_encoded_anew_as_upstream(base, tmp_path) -> None:
    tokenizer = data.load_tokenizer(str(base.tokenizer))
    flags: dict[str, Any] = {"step": CUT, "until": LAST, "out": tmp_path / "out"}
    before = data.batches(base)
    windows = data.batches(of_base("model", base, transform="swap_pronouns", **flags))
    whole = data.batches(of_base("model", base, transform="swap_pronouns_upstream", **flags))
    others = 0
    for step in range(LAST):
        for row, near, anew in zip(before[step], windows[step], whole[step], strict=True):
            text = tokenizer.decode(row.tolist(), skip_special_tokens=False)
            if step < CUT or swapped(text) == text:
                assert row.tolist() == near.tolist() == anew.tolist()
                continue
            ids = tokenizer.encode(swapped(tokenizer.decode(row.tolist()))).ids
            assert anew.tolist() == [*ids, *[PADDING] * WIDTH][:WIDTH]
            # What holds no part of a pronoun stands there in order, as it was; the last of it may
            # have been moved beyond the row's end.
            at, runs = 0, kept_runs(tokenizer, row)
            assert len(runs) > 1 and near[: len(runs[0])].tolist() == runs[0]
            for kept in filter(None, runs):
                # A window is of a word or two, so of a few tokens.
                places = range(at, min(at + 12, WIDTH) + 1)
                at = next(i for i in places if near[i:][: len(kept)].tolist() == kept[: WIDTH - i])
                at = min(at + len(kept), WIDTH)
            left = [token for token in near.tolist() if token != PADDING]
            found = tokenizer.decode(left, skip_special_tokens=False)
            assert swapped(text).startswith(found)
            others += near.tolist() != anew.tolist()
    assert others  # the two readings are two: upstream's loses the ends of documents


def test_training_begins_at_the_base_runs_state_and_sees_the_changed_rows(base, tmp_path) -> None:
    out = tmp_path / "out"
    assert run(*asked(base, out, until=6)).exit_code == 0
    assert digests(out, CUT) == digests(folder_of(base), CUT)
    saved = configs.load(out / "config.yaml")
    model = pj.load(folder_of(base), step=CUT)
    lines = [line for line in read_metrics(out / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [4, 5]
    loss = pj.loss(model.params, data.batches(saved)[CUT], model.config)
    assert lines[0]["loss"] == pytest.approx(float(loss), abs=1e-6)
    plain = pj.loss(model.params, data.batches(base)[CUT], model.config)
    assert abs(float(plain) - float(loss)) > 1e-4
    # The schedule is the base run's, and the last checkpoint stays.
    metrics = read_metrics(folder_of(base) / "metrics.jsonl")
    rates = {line["step"]: line["learning_rate"] for line in metrics if "loss" in line}
    assert all(line["learning_rate"] == rates[line["step"]] for line in lines)
    assert {path.name for path in (out / "checkpoints").iterdir()} >= {"4", "6"}


def test_a_transform_that_changes_nothing_gives_the_base_run_to_the_bit(base, here, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        result = run(*asked(base, here / "out", transform="my_interventions:none"))
    assert result.exit_code == 0, result.output
    assert digests(here / "out", LAST) == digests(folder_of(base), LAST)
    assert "my_interventions:none changes 0 of the 6 rows of batch 4" in caplog.text


def test_a_users_own_transform_is_found_and_gone_on_with_to_the_bit(base, here) -> None:
    name = "my_interventions:reversed"
    assert run(*asked(base, here / "one", transform=name)).exit_code == 0
    assert run(*asked(base, here / "two", transform=name, until=6)).exit_code == 0
    result = run(*asked(base, here / "two", transform=name))
    assert result.exit_code == 0, result.output
    assert digests(here / "one", LAST) == digests(here / "two", LAST)
    assert digests(here / "one", LAST) != digests(folder_of(base), LAST)
    for folder in ("one", "two"):
        steps = [line["step"] for line in read_metrics(here / folder / "metrics.jsonl")]
        assert sorted({*steps}) == list(range(CUT, LAST + 1))


def test_a_transform_that_fails_on_the_way_is_told_and_what_was_trained_stays(base, here) -> None:
    keys = ["--checkpoint.every", 1]
    message = refused(*asked(base, here / "out", transform="my_interventions:failing"), *keys)
    assert "my_interventions:failing (data.transform) returned at step 6 int32 [6, 32]" in message
    kept = {int(path.name) for path in (here / "out" / "checkpoints").iterdir()}
    assert CUT in kept and max(kept) <= 6


def test_the_folder_tells_what_changed_its_data_and_refuses_another_source(base, here) -> None:
    flags = {"transform": "my_interventions:reversed"}
    assert run(*asked(base, here / "out", until=5, **flags)).exit_code == 0
    saved = json.loads((here / "out" / "data.json").read_text())
    assert saved["transform"]["function"] == "my_interventions:reversed"
    assert saved["transform"]["from"] == CUT and len(saved["transform"]["source_sha256"]) == 64
    told = open_any(str(here / "out")).facts["hash.transform"]
    assert told.startswith("my_interventions:reversed from step 4 on, source ")
    source = here / "my_interventions.py"
    text = source.read_text()
    source.write_text(text + "# anything\n")
    message = refused(*asked(base, here / "out", **flags))
    assert "my_interventions:reversed, had another source than it has now" in message
    # Whoever knows better may say so.
    del saved["transform"]
    (here / "out" / "data.json").write_text(json.dumps(saved))
    assert run(*asked(base, here / "out", until=6, **flags)).exit_code == 0
    assert "transform" in json.loads((here / "out" / "data.json").read_text())
    message = refused(*asked(base, here / "out", transform="my_interventions:none"))
    assert "data.transform was 'my_interventions:reversed'" in message


def test_weights_alone_take_a_choice_of_moments(base, tmp_path) -> None:
    model = tmp_path / "hf"
    hf_out.save(run_in.open_folder(folder_of(base), CUT), model)
    config = ["--model.hidden-act", "gelu_pytorch_tanh"]
    message = refused(*asked(base, tmp_path / "out", model=model), *config)
    assert "no optimizer state; choose" in message and "rebuild:60 or zero" in message
    assert not (tmp_path / "out").exists()
    flags = {"model": model, "until": 5}
    for state in ("zero", "rebuild:3"):
        out = tmp_path / state.replace(":", "-")
        result = run(*asked(base, out, optimizer_state=state, **flags), *config)
        assert result.exit_code == 0, result.output
        saved = configs.load(out / "config.yaml")
        assert saved.initialize_from is not None
        assert saved.initialize_from.optimizer_state == state


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"until": 9}, "steps 4 to 9 are no part of the base run, which goes from step 0 to 8"),
        ({"until": 4}, "steps 4 to 4 are no part"),
        ({"step": -1}, "steps -1 to 8 are no part"),
        ({"step": 3}, "no checkpoint of step 3"),
        ({"transform": "swap"}, "'swap' is no transform; give one of swap_pronouns, "),
        ({"transform": "nowhere:f"}, "data.transform: nowhere:f: module nowhere cannot be"),
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"data": "/nowhere.yaml"}, "/nowhere.yaml: there is no such config file"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_and_nothing_is_written(base, here, flags, message) -> None:
    assert message in refused(*asked(base, here / "out", **flags))
    assert not (here / "out").exists()


def test_tasks_of_the_base_run_are_looked_up_before_anything_is_written(base, tmp_path) -> None:
    pytest.importorskip("lm_eval")
    message = refused(*asked(base, tmp_path / "out"), "--evaluation.tasks", "[nothing_like_it]")
    assert "evaluation.tasks: " in message and "nothing_like_it" in message
    assert not (tmp_path / "out").exists()


def test_a_transform_without_its_tokenizer_is_refused(base, tmp_path) -> None:
    config = dataclasses.replace(base, tokenizer=None)
    with pytest.raises(ConfigError, match=r"tokenizer: missing"):
        intervene(
            str(folder_of(base)),
            config,
            step=CUT,
            until=LAST,
            transform="swap_pronouns",
            out=tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


def test_two_transforms_are_refused(base, tmp_path) -> None:
    flags: dict[str, Any] = {"step": 4, "until": 5, "transform": "swap_pronouns", "out": tmp_path}
    once = of_base("model", base, **flags)
    with pytest.raises(ConfigError, match="there can be one"):
        of_base("model", once, **flags)


def test_a_config_that_is_not_the_base_runs_is_told(base, tmp_path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        result = run(*asked(base, tmp_path / "out", until=5), "--data.seed", 5)
    assert result.exit_code == 0, result.output
    assert "the runs differ by more than the transform: data.seed was 1234, is 5" in caplog.text


def test_flags_before_the_model_are_told() -> None:
    result = click.unstyle(
        refused(
            "intervene",
            "--data.seed",
            5,
            "--step",
            1,
            "--until",
            2,
            "--data",
            "x",
            "--transform",
            "y",
            "--out",
            "z",
        )
    )
    assert "MODEL comes before its flags" in result
