"""Training without some rows: that of the same weights by hand, beside the run itself."""

import csv
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from command_line import refused, run
from interp_runs import BATCH, SEQ, run_config
from tokenizers import Tokenizer, models, pre_tokenizers

import pythia_jax as pj
from pythia_jax import data
from pythia_jax.cli import main
from pythia_jax.cli.counterfactual import counterfactual as command
from pythia_jax.configs import RunConfig
from pythia_jax.interp import metagradients, preflight
from pythia_jax.interp.counterfactual_files import read_weights
from pythia_jax.interp.counterfactuals import Counterfactual, counterfactual, counterfactual_of
from pythia_jax.interp.evaluation_rows import EvaluationRows, evaluation_rows, text_row
from pythia_jax.interp.resuming import differences, resumed
from pythia_jax.training.step import TrainState, init_state, jitted_train_step
from pythia_jax.training.telemetry import read_metrics
from pythia_jax.training.trainer import train

if "counterfactual" not in main.commands:
    main.add_command(command)

START, STEPS = 3, 4
DROPPED = {(4, 1): 0.0, (6, 2): 0.0, (6, 0): 2.5}


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> RunConfig:
    """Trained for 8 steps, with whole states of steps 3, 4, 6 and 8."""
    config = run_config(tmp_path_factory.mktemp("base"))
    train(config, show_progress=False)
    return config


@pytest.fixture(scope="module")
def rows(base: RunConfig) -> EvaluationRows:
    assert base.model is not None
    return evaluation_rows(base.data.train[0], base.model)


@pytest.fixture(scope="module")
def found(base: RunConfig, rows: EvaluationRows) -> tuple[Counterfactual, dict[int, list[str]]]:
    return counterfactual_of(
        folder_of(base), base, DROPPED, step=START, steps=STEPS, rows=rows, show_progress=False
    )


def folder_of(config: RunConfig) -> str:
    return config.checkpoint.directory


def by_hand(config: RunConfig, weights: dict, stop: int) -> TrainState:
    """From the first step on, every step told the weight of each of its rows."""
    state = jax.jit(init_state, static_argnums=0)(config)
    for step, tokens in enumerate(data.batches(config)):
        if step == stop:
            break
        given = [weights.get((step, slot), 1.0) for slot in range(BATCH)]
        row_weights: Any = np.array(given, np.float32)
        state, _ = jitted_train_step(state, tokens, row_weights, config=config)
    return state


def same_bits(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def test_the_changed_run_is_training_by_hand_with_those_weights(base, found) -> None:
    wanted = by_hand(base, DROPPED, START + STEPS)
    assert same_bits(found[0].changed_state, wanted)
    assert not same_bits(found[0].base_state, wanted)


def test_the_base_run_is_the_runs_own_to_the_bit_and_another_is_told(base, found) -> None:
    assert found[1] == {4: [], 6: []}
    assert same_bits(found[0].base_state, by_hand(base, {}, START + STEPS))
    assert differences(folder_of(base), 7, found[0].base_state) is None
    wrong = differences(folder_of(base), 6, found[0].base_state)
    assert wrong is not None and "params/embed_in/embedding" in wrong


def test_weights_of_1_change_nothing(base) -> None:
    with resumed(folder_of(base), base, START, steps=3, show_progress=False) as run:
        kept = np.asarray(run.state.params["embed_in"]["embedding"])
        weights = {(3, 0): 1.0, (5, 3): 1.0}
        same = counterfactual(run.state, weights, run.config, steps=3)
        # The state given is left as it is, and may be used again.
        np.testing.assert_array_equal(run.state.params["embed_in"]["embedding"], kept)
    assert same_bits(same.base_state, same.changed_state)
    assert not same.distance.any()
    np.testing.assert_array_equal(same.base_loss, same.changed_loss)


def test_the_batches_of_a_resumed_run_are_those_that_a_metagradient_takes(base) -> None:
    with resumed(folder_of(base), base, START, show_progress=False) as run:
        taken = metagradients._stacked(run.state, run.batches, 2, run.config)
    np.testing.assert_array_equal(taken, [data.batches(base)[START + i] for i in range(2)])


def test_runs_that_do_not_fit_are_refused_with_the_numbers(base, monkeypatch) -> None:
    with resumed(folder_of(base), base, START, show_progress=False) as run:
        size = sum(x.nbytes for x in jax.tree.leaves(run.state))
        monkeypatch.setattr(preflight, "host_memory", lambda: size)
        # One more state would fit, and what a step takes beside it does not.
        with pytest.raises(MemoryError, match="a changed run beside the base run takes") as told:
            counterfactual(run.state, {(START, 0): 0.0}, run.config, steps=1)
    assert f"{preflight.in_bytes(size)} of memory on" not in str(told.value)
    assert f"and {preflight.in_bytes(size)} are free" in str(told.value)
    monkeypatch.setattr(preflight, "host_memory", lambda: size - 1)
    wanted = f"a train state of this model takes {preflight.in_bytes(size)} of memory"
    with (
        pytest.raises(MemoryError, match=wanted),
        resumed(folder_of(base), base, START, show_progress=False),
    ):
        pass


def test_what_is_told_is_what_the_two_runs_do(base, rows, found) -> None:
    told = found[0]
    lines = read_metrics(Path(folder_of(base)) / "metrics.jsonl")
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    steps = range(START, START + STEPS)
    np.testing.assert_allclose(told.base_loss, [losses[step] for step in steps], atol=2e-6)
    # Up to the first changed row the runs are one; the loss of its step is of all rows.
    assert (told.changed_loss == told.base_loss).tolist() == [True, True, False, False]
    assert (told.distance > 0).tolist() == [False, True, True, True]
    changed = by_hand(base, DROPPED, 6)
    loss = pj.loss(changed.params, data.batches(base)[6], base.model)
    assert told.changed_loss[3] == pytest.approx(float(loss), abs=2e-6)
    apart = jax.tree.map(
        lambda x, y: np.sum((np.asarray(x, np.float64) - np.asarray(y)) ** 2),
        told.base_state.params,
        told.changed_state.params,
    )
    assert told.distance[-1] == pytest.approx(np.sqrt(sum(jax.tree.leaves(apart))), rel=1e-5)
    squares = sum(value**2 for value in told.by_parameter.values())
    assert told.distance[-1] == pytest.approx(np.sqrt(squares), rel=1e-5)
    for values, state in ((told.base, told.base_state), (told.changed, told.changed_state)):
        row, length = 2, int(rows.lengths[2])
        nll = pj.token_losses(state.params, rows.tokens[row : row + 1, :length], base.model)
        assert values[row] == pytest.approx(float(nll.mean()), abs=1e-6)
    np.testing.assert_array_equal(told.effect, told.changed - told.base)
    assert len(told.before) == len(rows) and np.abs(told.before - told.base).max() > 0.01


def table(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def asked(base: RunConfig, **flags: Any) -> list[object]:
    flags = {"from": START, "train-steps": 2, "eval": base.data.train[0], **flags}
    model = flags.pop("model", folder_of(base))
    options = [(f"--{key}", value) for key, value in flags.items() if value is not None]
    return ["counterfactual", model, *(part for option in options for part in option)]


def test_the_command_reads_hits_and_writes_what_came_of_it(base, tmp_path, caplog) -> None:
    hits = table(
        tmp_path / "hits.csv",
        "score,row,step,slot,start,stop,document",
        f"0.5,0,4,1,0,{SEQ + 1},7",
        f"0.4,9,7,1,0,{SEQ + 1},7",
    )
    np.save(tmp_path / "q.npy", data.batches(base)[0])
    out = tmp_path / "out"
    with caplog.at_level(logging.WARNING):
        result = run(*asked(base, drop=hits, eval=tmp_path / "q.npy", out=out))
    assert result.exit_code == 0, result.output
    assert "1 rows dropped" in result.output and "equal, bit for bit" in result.output
    assert f"loss of {tmp_path / 'q.npy'}, in nats a token" in result.output
    assert "1 of the 2 rows given are not of steps 3 to 5" in caplog.text
    lines = list(csv.DictReader((out / "evaluation.csv").open()))
    assert [int(line["row"]) for line in lines] == list(range(BATCH))
    told = json.loads((out / "counterfactual.json").read_text())
    changes = [float(line["change"]) for line in lines]
    assert told["loss"]["change"] == pytest.approx(np.mean(changes))
    assert any(changes) and told["base_differs_from_run_at"] == {"4": []}
    steps = list(csv.DictReader((out / "steps.csv").open()))
    assert [int(line["step"]) for line in steps] == [3, 4]
    assert (out / "rows.csv").read_text() == "step,slot,weight\n4,1,0.0\n"


@pytest.mark.parametrize(
    ("lines", "flags", "message"),
    [
        (["step,slot", "9,0"], {}, "none of the 1 rows given is of steps 3 to 5 (not included)"),
        (["step,slot", "3,4"], {}, "step 3, slot 4: a batch has rows 0 to 3"),
        (["step,slot", "3,x"], {}, "line 2: 'x' is no finite number"),
        (["step,slot", "3,0.5"], {}, "line 2: slot '0.5' is no whole number"),
        (["step,row", "3,0"], {}, "line 2: column slot is missing"),
        (["step,slot"], {}, "holds no rows"),
        (["step,slot,weight", "3,0,1"], {}, "give the file to --reweight"),
        (["step,slot,start,stop", "3,0,5,9"], {}, "tokens 5:9 are a part of a sequence"),
        (
            ["step,slot", "3,0"],
            {"train-steps": 6},
            "steps 3 to 8 are no part of the run, which has 8 steps",
        ),
        (["step,slot,data", "3,0,0:4:12ab"], {}, "line 2: is a row of other data, or of another"),
        (["step,slot,data", "3,0,pile"], {}, "'pile' does not tell of which data the rows are"),
        (["step,slot", "5,0"], {"from": 5}, "no checkpoint of step 5; there are"),
        (["step,slot", "3,0"], {"eval": "data/validatoin"}, "data/validatoin.idx: no such file"),
        (["step,slot", "3,0"], {"eval": "gone.npy"}, "gone.npy: there is no such file"),
        (["step,slot", "3,0"], {"eval-text": "words"}, "Give --eval or --eval-text, one of them"),
        (["step,slot", "3,0"], {"eval": None, "eval-text": "words"}, "text needs a tokenizer"),
        (["step,slot", "3,0"], {"model": "/nowhere"}, "/nowhere is no run folder here"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    base, tmp_path, lines, flags, message
) -> None:
    hits, out = table(tmp_path / "hits.csv", *lines), tmp_path / "out"
    assert message in refused(*asked(base, drop=hits, out=out, **flags))
    assert not out.exists()


def test_hits_in_parquet_are_those_in_csv(base, tmp_path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"score": [0.5, 0.25], "step": [4, 4], "slot": [1, 0], "weight": [0.0, 2.0]}
    parquet.write_table(arrow.table(columns), tmp_path / "hits.parquet")
    found = read_weights(tmp_path / "hits.parquet", base, drop=False)
    assert found == {(4, 1): 0.0, (4, 0): 2.0}
    hits = table(tmp_path / "hits.csv", "score,step,slot,weight", "0.5,4,1,0", "0.25,4,0,2")
    assert read_weights(hits, base, drop=False) == found


def test_one_row_with_two_weights_and_both_kinds_of_tables_are_refused(base, tmp_path) -> None:
    twice = table(tmp_path / "w.csv", "step,slot,weight", "3,0,1", "3,0,2")
    assert "has weight 2.0 here, and 1.0 before" in refused(*asked(base, reweight=twice))
    assert "one of them" in refused(*asked(base, reweight=twice, drop=twice))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    assert "not an empty folder" in refused(*asked(base, drop=twice, out=taken))


def test_a_text_is_evaluated_with_its_tokenizer(base) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 1, "b": 2, "c": 3}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    found = text_row("c b a", base.model, tokenizer)
    assert found.tokens.tolist() == [[3, 2, 1]] and found.name == "the text 'c b a'"
    with pytest.raises(ValueError, match="the text 'c': row 0 has 1 tokens; from 2 to 17"):
        text_row("c", base.model, tokenizer)


@pytest.mark.slow
def test_four_devices_tell_what_one_does(base, tmp_path) -> None:
    hits = table(tmp_path / "hits.csv", "step,slot", "3,1", "4,0")
    assert run(*asked(base, drop=hits, out=tmp_path / "one")).exit_code == 0
    code = "import sys; from pythia_jax.cli.counterfactual import counterfactual; counterfactual()"
    arguments = map(str, asked(base, drop=hits, out=tmp_path / "four")[1:])
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    more = ["--mesh.data", "2", "--mesh.fsdp", "2"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, *more],
        env={**os.environ, **flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name, columns in (("evaluation.csv", 2), ("steps.csv", 1)):
        one, four = (
            np.loadtxt(tmp_path / of / name, delimiter=",", skiprows=1)[:, columns:]
            for of in ("one", "four")
        )
        np.testing.assert_allclose(four, one, atol=1e-5)
