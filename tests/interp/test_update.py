"""One optimizer step taken apart: its causes, and the rows of its batch."""

import csv
import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import refused, run
from flax import traverse_util
from interp_runs import BATCH, run_config

import pythia_jax as pj
from pythia_jax import data
from pythia_jax.cli import main
from pythia_jax.cli.update import update as command
from pythia_jax.configs import RunConfig
from pythia_jax.interp import preflight, update_files
from pythia_jax.interp.resuming import resumed
from pythia_jax.interp.update_files import by_group, groups
from pythia_jax.interp.updates import PARTS, Update, update, update_of
from pythia_jax.model.parameters import TABLE
from pythia_jax.training.optimizer import learning_rates
from pythia_jax.training.step import TrainState, init_state
from pythia_jax.training.trainer import train

if "update" not in main.commands:
    main.add_command(command)

STEP = 3
CLIP = 0.3
KEYS = "layers/attention/query_key_value/bias"
"""A bias of keys moves all scores of a query alike: its gradient is rounding alone, of which Adam
makes a change all the same, another one in another program."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> RunConfig:
    """Trained for 8 steps, its gradients clipped; whole states of steps 3 and 4, among others."""
    config = run_config(tmp_path_factory.mktemp("base"), optimizer={"gradient_clip": CLIP})
    train(config, show_progress=False)
    return config


@pytest.fixture(scope="module")
def before(base: RunConfig) -> TrainState:
    with resumed(base.checkpoint.directory, base, STEP, show_progress=False) as found:
        return jax.tree.map(np.asarray, found.state)


@pytest.fixture(scope="module")
def found(base: RunConfig) -> tuple[Update, list[str] | None]:
    return update_of(base.checkpoint.directory, base, step=STEP, show_progress=False)


def flat(tree: Any) -> dict[str, np.ndarray]:
    named = traverse_util.flatten_dict(tree, sep="/")
    return {path: np.asarray(value, np.float64) for path, value in named.items()}


def dot(x: np.ndarray, y: np.ndarray, path: str) -> np.ndarray:
    """Over all but layers."""
    return (x * y).sum(axis=tuple(range(path.startswith("layers/"), x.ndim)))


def row_gradients(base: RunConfig, state: TrainState) -> list[dict[str, np.ndarray]]:
    """Of each row's share of the batch's loss, by jax.grad."""
    tokens, model = data.batches(base)[STEP], base.model
    assert model is not None

    @jax.jit
    def gradient(row: jax.Array) -> Any:
        return jax.grad(lambda p: pj.loss(p, row[None], model) / BATCH)(state.params)

    return [flat(gradient(row)) for row in tokens]


def total(gradients: list[dict[str, np.ndarray]], path: str) -> np.ndarray:
    return np.sum([of[path] for of in gradients], axis=0)


def parts_by_hand(base: RunConfig, state: TrainState) -> dict[str, dict[str, np.ndarray]]:
    """Adam in float64, written out."""
    settings, (_, adam, *_rest) = base.optimizer, state.opt_state
    gradients = row_gradients(base, state)
    gradient = {path: total(gradients, path) for path in gradients[0]}
    norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    assert norm > CLIP  # so that clipping does something
    rate = learning_rates(settings, base.training.steps)[int(state.updates)]
    b1, b2 = settings.betas
    count = int(adam.count) + 1
    mu, nu, params = flat(adam.mu), flat(adam.nu), flat(state.params)
    found: dict[str, dict[str, np.ndarray]] = {name: {} for name in PARTS}
    for parameter in TABLE:
        path = parameter.path
        g = gradient[path]
        clipped = g * CLIP / (norm + 1e-6)

        def moved(m: np.ndarray, g: np.ndarray, path: str = path) -> np.ndarray:
            v = b2 * nu[path] + (1 - b2) * g**2
            step = m / (1 - b1**count) / (np.sqrt(v / (1 - b2**count)) + settings.eps)
            return -rate * step

        found["batch"][path] = moved((1 - b1) * g, g)
        found["momentum"][path] = moved(b1 * mu[path], g)
        plain = moved(b1 * mu[path] + (1 - b1) * g, g)
        found["clipping"][path] = moved(b1 * mu[path] + (1 - b1) * clipped, clipped) - plain
        decay = settings.weight_decay if parameter.decayed else 0
        found["decay"][path] = -rate * decay * params[path]
    return found


def test_the_state_after_is_the_runs_next_checkpoint(base, found) -> None:
    assert found[1] == []
    after = flat(found[0].after.params)
    assert int(found[0].after.step) == STEP + 1
    model = pj.load(base.checkpoint.directory, step=STEP + 1)
    for path, value in flat(model.params).items():
        np.testing.assert_array_equal(after[path], value)


def test_causes_are_adam_by_hand_and_add_up_to_the_change(base, before, found) -> None:
    told, parts = found[0], parts_by_hand(base, before)
    params, after = flat(before.params), flat(told.after.params)
    for path in params:
        change = after[path] - params[path]
        together = sum(told.shares[name][path] for name in PARTS)
        np.testing.assert_allclose(together, 1, atol=1e-5)
        size = np.sqrt(dot(params[path], params[path], path))
        assert (told.parts["rounding"][path] <= 1e-6 * (size + told.change[path])).all()
        if path == KEYS:
            continue
        wanted = sum(parts[name][path] for name in PARTS if name != "rounding")
        np.testing.assert_allclose(wanted, change, atol=1e-6)
        np.testing.assert_allclose(told.change[path], np.sqrt(dot(change, change, path)), rtol=1e-5)
        for name in PARTS[:-1]:
            part = parts[name][path]
            norm = np.sqrt(dot(part, part, path))
            np.testing.assert_allclose(told.parts[name][path], norm, rtol=2e-4, atol=1e-8)
            share = dot(part, change, path) / dot(change, change, path)
            np.testing.assert_allclose(told.shares[name][path], share, rtol=1e-3, atol=1e-5)


def test_gradient_cosine_and_clip_are_those_of_the_batch(base, before, found) -> None:
    told, gradients = found[0], row_gradients(base, before)
    params, after = flat(before.params), flat(told.after.params)
    squares = 0.0
    for path in params:
        gradient, change = total(gradients, path), after[path] - params[path]
        norm = np.sqrt(dot(gradient, gradient, path))
        np.testing.assert_allclose(told.gradient[path], norm, rtol=1e-4)
        cosine = -dot(gradient, change, path) / norm / np.sqrt(dot(change, change, path))
        np.testing.assert_allclose(told.cosine[path], cosine, atol=1e-4)
        squares += (gradient**2).sum()
    assert told.gradient_norm == pytest.approx(np.sqrt(squares), rel=1e-5)
    assert told.clip == pytest.approx(CLIP / np.sqrt(squares), rel=1e-5)
    loss = pj.loss(before.params, data.batches(base)[STEP], base.model)
    assert told.loss == pytest.approx(float(loss), abs=1e-6)
    rates = learning_rates(base.optimizer, base.training.steps)
    assert told.learning_rate == pytest.approx(rates[STEP])


def test_rows_parts_are_their_own_gradients_and_add_up_to_the_batchs(base, before, found) -> None:
    told, gradients = found[0], row_gradients(base, before)
    params, after = flat(before.params), flat(told.after.params)
    for path in params:
        change = after[path] - params[path]
        for row, of in enumerate(gradients):
            part = told.clip * of[path]
            np.testing.assert_allclose(
                told.norms[path][row], np.sqrt(dot(part, part, path)), rtol=1e-4, atol=1e-8
            )
            scale = np.sqrt(dot(part, part, path) * dot(change, change, path)).max()
            wanted = dot(part, change, path)
            np.testing.assert_allclose(told.dots[path][row], wanted, atol=1e-5 * scale)
        whole = told.clip * total(gradients, path)
        lengths = np.sqrt(dot(whole, whole, path) * dot(change, change, path)).max()
        summed = told.dots[path].sum(axis=0)
        np.testing.assert_allclose(summed, dot(whole, change, path), atol=1e-5 * lengths)
    assert told.row_dots.sum() == pytest.approx(told.batch_dot, rel=1e-5)
    assert told.rows.tolist() == list(range(BATCH)) and told.batch == BATCH
    tokens = data.batches(base)[STEP]
    for losses, at in ((told.losses_before, before.params), (told.losses_after, told.after.params)):
        nll = pj.token_losses(at, tokens, base.model).mean(axis=1)
        np.testing.assert_allclose(losses, nll, atol=2e-6)


def test_what_is_predicted_is_what_a_short_step_does(base, before) -> None:
    state: Any = before
    # The rate is a hundredth, so that the first order is nearly all.
    rates = {"peak_learning_rate": 1e-4, "min_learning_rate": 1e-5}
    slow = replace(base, optimizer=replace(base.optimizer, **rates))
    told = update(state, data.batches(base)[STEP], slow, rows=2)
    assert told.rows.tolist() == [0, 2]
    change = told.losses_after - told.losses_before
    np.testing.assert_allclose(told.predicted, change, rtol=0.05)


def test_layers_together_are_all(found) -> None:
    told, of = found[0], groups(found[0])
    assert list(of) == [
        "embed_in",
        "layer 0",
        "layer 1",
        "final_layer_norm",
        "embed_out",
        "all",
    ]
    assert of["all"]["gradient"] == pytest.approx(told.gradient_norm, rel=1e-5)
    for group in of.values():
        assert sum(group[name] for name in PARTS) == pytest.approx(1, abs=1e-5)
        assert -1 <= group["cosine"] <= 1
    by_layer = by_group(told.dots, 2)
    np.testing.assert_allclose(sum(by_layer.values()), told.row_dots, rtol=1e-5)


def test_the_command_prints_a_table_and_writes_csv_and_json(base, tmp_path) -> None:
    out = tmp_path / "out"
    result = run("update", base.checkpoint.directory, "--step", STEP, "--rows", 3, "--out", out)
    assert result.exit_code == 0, result.output
    assert "equal, bit for bit, to the run's own checkpoint 4" in result.output
    assert "(3 of 3 rows looked at, of 4;" in result.output
    lines = list(csv.DictReader((out / "parameters.csv").open()))
    stacked = sum(parameter.stacked for parameter in TABLE)
    assert len(lines) == 2 * stacked + len(TABLE) - stacked
    shares = [[float(line[f"share_{name}"]) for name in PARTS] for line in lines]
    np.testing.assert_allclose(np.sum(shares, axis=1), 1, atol=1e-5)
    rows = list(csv.DictReader((out / "rows.csv").open()))
    assert [int(line["row"]) for line in rows] == [0, 1, 2]
    for line in rows:
        of_layers = [float(line[key]) for key in line if key.startswith("dot ")]
        assert len(of_layers) == 5 and sum(of_layers) == pytest.approx(float(line["dot"]), rel=1e-4)
    told = json.loads((out / "update.json").read_text())
    assert told["differs_from_next_checkpoint"] == [] and told["rows"] == {"looked_at": 3, "of": 4}


def test_a_step_that_makes_no_update_is_refused(base, before) -> None:
    state: Any = jax.tree.map(jnp.asarray, before)
    broken = dict(state.params, embed_out={"kernel": state.params["embed_out"]["kernel"] * np.nan})
    with pytest.raises(ValueError, match="step 3 makes no update"):
        update(state.replace(params=broken), data.batches(base)[STEP], base)


def test_a_step_that_does_not_fit_is_refused_with_the_numbers(base, before, monkeypatch) -> None:
    kept = [sum(x.nbytes for x in jax.tree.leaves(of)) for of in (before, before.params)]
    monkeypatch.setattr(preflight, "host_memory", lambda: sum(kept) - 1)
    told = f"the state after a step, and what it changed, takes {preflight.in_bytes(sum(kept))}"
    with pytest.raises(MemoryError, match=told):
        update(before, data.batches(base)[STEP], base)


def test_steps_that_are_not_there_are_refused(base, tmp_path) -> None:
    folder = base.checkpoint.directory
    told = refused("update", folder, "--step", 8)
    assert "step 8 is no part of the run, which has 8 steps (training.steps), from 0 on" in told
    assert "no checkpoint of step 5; there are" in refused("update", folder, "--step", 5)
    assert "is no run folder here" in refused("update", tmp_path, "--step", 1)


def test_a_step_whose_learning_rate_is_0_changes_nothing_and_is_told_so(base, tmp_path) -> None:
    state = jax.jit(init_state, static_argnums=0)(base)
    told = update(state, data.batches(base)[0], base, rows=1)
    assert told.learning_rate == 0 and not any(value.any() for value in told.change.values())
    assert np.isnan(told.cosine["embed_out/kernel"])
    update_files.write(tmp_path / "out", told, None, {})
    shown = json.loads((tmp_path / "out" / "update.json").read_text())
    assert shown["by_layer"]["all"]["cosine"] is None
    assert "nan" in update_files.text(told, "")
