"""Recited rows: a model that knows some by heart, upstream's loop, kills, devices, refusals."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from reference import hf_logits, hf_model

import pythia_jax as pj
from pythia_jax import configs
from pythia_jax.bridge import Model
from pythia_jax.cli.memorization import memorization as command
from pythia_jax.configs import RunConfig
from pythia_jax.data import IndexedDatasetWriter, batches
from pythia_jax.evaluation.memorization import memorization, memorization_of, score
from pythia_jax.evaluation.memorization_files import read
from pythia_jax.training.step import init_state, jitted_train_step

BATCH, WIDTH, VOCAB, STEPS = 4, 24, 96, 40
KNOWN = 3 * BATCH  # rows that the model is taught, all of the first three steps
TAUGHT = 120  # steps
# All of one number of rows together: one program for most tests.
HOW: dict[str, Any] = {"prompt_length": 6, "continuation_length": 10, "batch_size": 8}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run over preshuffled rows of noise, which nobody can guess."""
    prefix = tmp_path_factory.mktemp("data") / "rows"
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
        for row in range(STEPS * BATCH):
            tokens = rng.integers(1, VOCAB, WIDTH).astype(np.uint16)
            if row % BATCH == 3:
                tokens[12] = 0  # the end of a document, within the continuation
            writer.add(tokens)
    return configs.from_dict(
        {
            "model": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "vocab_size": VOCAB,
                "max_position_embeddings": 32,
            },
            "data": {
                "train": [str(prefix)],
                "order": "preshuffled",
                "sequence_length": WIDTH - 1,
            },
            "optimizer": {"peak_learning_rate": 1e-2, "weight_decay": 0.0},
            "training": {
                "steps": STEPS,
                "batch_size": BATCH,
                "precision": "float32",
                "remat": "none",
            },
        }
    )


@pytest.fixture(scope="module")
def rows(config: RunConfig) -> np.ndarray:
    return np.concatenate(list(batches(config)))


@pytest.fixture(scope="module")
def model(config: RunConfig, rows: np.ndarray) -> Model:
    """Taught the first rows until it has them by heart; called the checkpoint of step 3."""
    teaching = dataclasses.replace(
        config, training=dataclasses.replace(config.training, steps=TAUGHT, batch_size=KNOWN)
    )
    state = init_state(teaching)
    for _ in range(TAUGHT):
        state, _ = jitted_train_step(state, rows[:KNOWN], config=teaching)
    assert config.model is not None
    return Model(state.params, config.model, source="taught", step=3)


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "model"
    pj.save_hf(model, path)
    return path


def theirs(model: Model, rows: np.ndarray, prompt: int, continuation: int) -> list[float]:
    """Upstream's loop, a row at a time: its `generate`, its mean of equal places."""
    reference = cast(Any, hf_model(model.params, model.config))
    width, found = prompt + continuation, []
    for row in torch.tensor(rows[:, :width]).long():
        out = reference.generate(
            row[None, :prompt], max_length=width, min_length=width, do_sample=False, pad_token_id=0
        )
        found.append(float((out[0, prompt:width] == row[prompt:]).double().mean()))
    return found


def test_rows_known_by_heart_score_one_and_others_next_to_nothing(
    model: Model, rows: np.ndarray
) -> None:
    found = score(model, rows, **HOW)
    holds_end = (rows[:, 6:16] == 0).any(axis=1)
    assert (found[:KNOWN][~holds_end[:KNOWN]] == 1).all()
    assert found[KNOWN:].max() < 0.5
    assert found[KNOWN:].mean() < 0.05


@pytest.mark.parametrize(("prompt", "continuation"), [(6, 10), (9, 3), (1, 20)])
def test_scores_are_those_of_a_plain_loop_with_transformers(
    model: Model, rows: np.ndarray, prompt: int, continuation: int
) -> None:
    found = score(model, rows[:30], prompt_length=prompt, continuation_length=continuation)
    assert found.tolist() == theirs(model, rows[:30], prompt, continuation)
    assert len(set(found.tolist())) > 1


def test_the_end_of_a_document_is_never_recited(model: Model, rows: np.ndarray) -> None:
    ended = rows[3:4]
    assert ended[0, 12] == 0
    # The model knows it, and would say so if it might.
    logits = hf_logits(hf_model(model.params, model.config), ended[:, :12])
    assert logits[0, -1].argmax() == 0
    assert 0.6 <= score(model, ended, **HOW)[0] < 1  # what comes before it is recited


def test_scores_do_not_depend_on_the_company(model: Model, rows: np.ndarray) -> None:
    together = score(model, rows[:13], **HOW)
    assert score(model, rows[:13], **{**HOW, "batch_size": 1}).tolist() == together.tolist()


def test_the_file_holds_the_rows_seen_as_upstream_writes_them(
    model: Model, config: RunConfig, rows: np.ndarray, tmp_path: Path
) -> None:
    out = tmp_path / "scores.csv"
    found = memorization(model, config, out, **HOW, show_progress=False)
    expected = score(model, rows[:KNOWN], **HOW).tolist()
    lines = [f"{i},{value}" for i, value in enumerate(expected)]
    assert out.read_text() == "\n".join(lines) + "\n"
    assert (found.start, found.stop, found.memorized) == (0, KNOWN, expected.count(1.0))
    assert lines[0] == "0,1.0"
    told = json.loads((tmp_path / "scores.csv.json").read_text())
    assert told["settings"]["prompt_length"] == 6
    assert told["computed"]["step"] == 3
    # A second run has nothing to do.
    before = out.stat().st_mtime_ns
    assert memorization(model, config, out, **HOW, show_progress=False) == found
    assert out.stat().st_mtime_ns == before


def test_rows_are_those_of_the_order_wherever_a_block_begins(
    model: Model, config: RunConfig, rows: np.ndarray, tmp_path: Path
) -> None:
    out = tmp_path / "scores.csv"
    memorization(model, config, out, start=2, stop=25, **HOW, show_progress=False)
    read_back = read(out)
    assert read_back.index.tolist() == list(range(2, 25))
    assert read_back.score.tolist() == score(model, rows[2:25], **HOW).tolist()


KILLED = """
import os, signal, sys
from pythia_jax import configs
from pythia_jax.evaluation import memorization_files
from pythia_jax.evaluation.memorization import memorization_of

calls = 0
def fsync(handle):
    global calls
    calls += 1
    if calls == {blocks}:
        os.write(handle, b"{partial}")
        os.kill(os.getpid(), signal.SIGKILL)
memorization_files.os.fsync = fsync
memorization_of({folder!r}, configs.load({config!r}), {out!r}, step=10, **{how!r})
"""


@pytest.mark.parametrize("partial", [b"", b"16,0.", b"16,0.1\n17,0.3\n18"])
def test_killed_and_gone_on_with_equals_uninterrupted_to_the_byte(
    folder: Path, config: RunConfig, tmp_path: Path, partial: bytes
) -> None:
    how = {**HOW, "show_progress": False}
    whole, out = tmp_path / "whole.csv", tmp_path / "killed.csv"
    memorization_of(folder, config, whole, step=10, **how)
    content = whole.read_bytes()
    lines = content.splitlines(keepends=True)
    if partial:
        # What a kill leaves: two blocks, and of the third what had reached the disk.
        out.write_bytes(b"".join(lines[:16]) + partial)
        about = tmp_path / "whole.csv.json"
        (tmp_path / "killed.csv.json").write_bytes(about.read_bytes())
    else:
        configs.save(config, tmp_path / "config.yaml")
        code = KILLED.format(
            blocks=4,  # the file beside it, then three blocks
            partial="24,0.",
            folder=str(folder),
            config=str(tmp_path / "config.yaml"),
            out=str(out),
            how=how,
        )
        done = subprocess.run([sys.executable, "-c", code], check=False)
        assert done.returncode == -signal.SIGKILL
        assert out.read_bytes() == b"".join(lines[:24]) + b"24,0."
        assert read(out).index.tolist() == list(range(24))  # the part of a line is no row
    memorization_of(folder, config, out, step=10, **how)
    assert out.read_bytes() == content


def test_more_rows_are_added_to_a_file_that_was_whole(
    model: Model, config: RunConfig, tmp_path: Path
) -> None:
    how = {**HOW, "show_progress": False}
    memorization(model, config, tmp_path / "whole.csv", stop=30, **how)
    memorization(model, config, tmp_path / "grown.csv", stop=11, **how)
    memorization(model, config, tmp_path / "grown.csv", stop=30, **how)
    grown = (tmp_path / "grown.csv").read_bytes()
    assert grown == (tmp_path / "whole.csv").read_bytes()


def lengthened(config: RunConfig, steps: int, **data: Any) -> RunConfig:
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, **data),
        training=dataclasses.replace(config.training, steps=steps),
    )


def test_of_a_run_that_was_made_longer_more_rows_are_added_where_they_lie_in_order(
    model: Model, config: RunConfig, tmp_path: Path
) -> None:
    how = {**HOW, "show_progress": False}
    whole, grown = tmp_path / "whole.csv", tmp_path / "grown.csv"
    memorization(model, config, whole, stop=40, **how)
    memorization(model, lengthened(config, 5), grown, stop=20, **how)
    memorization(model, lengthened(config, 10), grown, stop=40, **how)
    assert grown.read_bytes() == whole.read_bytes()


def test_of_a_longer_run_in_an_order_of_its_own_no_row_is_added(
    model: Model, config: RunConfig, tmp_path: Path
) -> None:
    how, out = {**HOW, "show_progress": False}, tmp_path / "a.csv"
    run = lengthened(config, 5, order="neox")
    # The rows are others indeed.
    assert not np.array_equal(batches(run)[0], batches(lengthened(run, 60))[0])
    memorization(model, run, out, **how)
    before = out.read_bytes()
    for changed, message in (
        (lengthened(run, 60), r"rows\.training\.steps was 5, is 60"),
        (lengthened(run, 5, seed=7), r"rows\.data\.seed was 1234, is 7"),
        (lengthened(run, 5, order="preshuffled"), r"rows\.data\.order was 'neox', is 'presh"),
    ):
        with pytest.raises(FileExistsError, match=message):
            memorization(model, changed, out, **how)
    assert memorization(model, run, out, **how).stop == KNOWN
    assert out.read_bytes() == before


def test_other_tokens_in_documents_of_the_same_sizes_are_other_rows(
    model: Model, config: RunConfig, rows: np.ndarray, tmp_path: Path
) -> None:
    how, out = {**HOW, "show_progress": False}, tmp_path / "a.csv"
    with IndexedDatasetWriter(tmp_path / "rows", np.dtype(np.uint16)) as writer:
        for row in rows[::-1]:
            writer.add(row.astype(np.uint16))
    run = lengthened(config, STEPS, order="neox")
    memorization(model, run, out, **how)
    other = lengthened(run, STEPS, train=(str(tmp_path / "rows"),))
    with pytest.raises(FileExistsError, match="tokens_of_batch_0 is not the same") as refused:
        memorization(model, other, out, **how)
    assert not any(len(word) > 60 for word in str(refused.value).replace(str(out), "").split())


SHARDED = """
import jax
from pythia_jax import configs
from pythia_jax.evaluation.memorization import memorization_of

assert jax.device_count() == 8
run = configs.load({config!r})
for name, cut in (("data", {{}}), ("cut", {{"fsdp": 2, "tensor": 2}})):
    out = {folder!r} + "/" + name + ".csv"
    memorization_of({model!r}, run, out, step=10, show_progress=False, **cut, **{lengths!r})
"""


def test_on_eight_devices_the_file_is_the_same(
    folder: Path, config: RunConfig, tmp_path: Path
) -> None:
    memorization_of(folder, config, tmp_path / "one.csv", step=10, show_progress=False, **HOW)
    configs.save(config, tmp_path / "config.yaml")
    code = SHARDED.format(
        config=str(tmp_path / "config.yaml"),
        folder=str(tmp_path),
        model=str(folder),
        lengths=HOW,
    )
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    one = (tmp_path / "one.csv").read_bytes()
    for name in ("data", "cut"):
        assert (tmp_path / f"{name}.csv").read_bytes() == one
        told = json.loads((tmp_path / f"{name}.csv.json").read_text())
        ours = json.loads((tmp_path / "one.csv.json").read_text())
        assert told["settings"] == ours["settings"]  # one may go on with the other's file
        assert told["computed"]["devices"] == 8


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"prompt_length": 0}, "both must be at least 1"),
        ({"prompt_length": 20}, "do not fit rows of 24 tokens"),
        ({"stop": STEPS * BATCH + 1}, "has 160: 40 steps of 4"),
        ({"start": 12}, "rows 12 to 12 .* are none; at step 3 the model has seen 12"),
        ({"start": -1}, "rows -1 to 12"),
        ({"step": 0}, "at step 0 the model has seen 0"),
        ({"batch_size": 0}, "batch_size 0"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_no_file(
    model: Model, config: RunConfig, tmp_path: Path, how: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        memorization(model, config, tmp_path / "a.csv", **{**HOW, **how}, show_progress=False)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_does_not_tell_its_step_needs_one(
    model: Model, config: RunConfig, tmp_path: Path
) -> None:
    unknown = dataclasses.replace(model, step=None)
    with pytest.raises(ValueError, match="does not tell its step"):
        memorization(unknown, config, tmp_path / "a.csv", **HOW)
    found = memorization(unknown, config, tmp_path / "a.csv", step=1, **HOW)
    assert found.stop == BATCH


def test_rows_not_seen_yet_are_told(
    model: Model, config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memorization(model, config, tmp_path / "a.csv", stop=KNOWN, **HOW)
    assert "has not seen them" not in caplog.text
    memorization(model, config, tmp_path / "a.csv", stop=KNOWN + 1, **HOW)
    assert "rows from 12 on come after step 3: the model has not seen them" in caplog.text


def test_a_file_of_other_scores_is_refused_and_stays(
    model: Model, config: RunConfig, tmp_path: Path
) -> None:
    out = tmp_path / "a.csv"
    memorization(model, config, out, **HOW, show_progress=False)
    before = out.read_bytes()
    other = dataclasses.replace(
        model, params=jax.tree.map(lambda x: x * np.float32(0.5), model.params)
    )
    for asked, how, message in (
        (model, {"continuation_length": 9}, "continuation_length was 10, is 9"),
        (model, {"start": 1}, "start was 0, is 1"),
        (other, {}, "weights is not the same"),
    ):
        with pytest.raises(FileExistsError, match=f"holds other scores: {message}"):
            memorization(asked, config, out, **{**HOW, **how}, show_progress=False)
    (tmp_path / "a.csv.json").unlink()
    with pytest.raises(FileExistsError, match=r"no a\.csv\.json says what it is of"):
        memorization(model, config, out, **HOW, show_progress=False)
    assert out.read_bytes() == before


def test_tokens_of_another_vocabulary_are_refused(model: Model, rows: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"token ids .* to 96, .* 0 to 95"):
        score(model, np.where(rows == 5, VOCAB, rows), **HOW)


def test_a_damaged_file_is_refused(model: Model, config: RunConfig, tmp_path: Path) -> None:
    out = tmp_path / "a.csv"
    memorization(model, config, out, **HOW, show_progress=False)
    out.write_bytes(b"\0" * 40 + b"\n")
    with pytest.raises(ValueError, match="is damaged: it does not go from row 0 on"):
        memorization(model, config, out, stop=30, **HOW, show_progress=False)


def test_the_command_scores_and_draws(folder: Path, config: RunConfig, tmp_path: Path) -> None:
    configs.save(config, tmp_path / "run.yaml")
    arguments = [
        *(str(folder), "--data", str(tmp_path / "run.yaml"), "--step", "3"),
        *("--prompt-length", "6", "--continuation-length", "10", "--training.steps", "20"),
        *("--out", str(tmp_path / "s.csv"), "--plot", str(tmp_path / "s.png")),
    ]
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "rows 0 to 12 (not included): 9 recited whole (75 %)" in done.output
    assert "memorised rows a step: mean 3, variance / mean 0.000" in done.output
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert read(tmp_path / "s.csv").memorized.tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    refused = CliRunner().invoke(command, [*arguments, "--stop", "81"])
    assert "has 80: 20 steps of 4" in str(refused.exception)
