"""A step that gives no number: it never touches the state, and is written down."""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import Make, assert_same_bits

from pythia_jax import data
from pythia_jax.model import parameters
from pythia_jax.training import trainer
from pythia_jax.training.optimizer import learning_rate
from pythia_jax.training.step import init_state, jitted_train_step
from pythia_jax.training.telemetry import NonFiniteError, read_metrics
from pythia_jax.training.trainer import train


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_in_stop_mode_the_state_halts_and_stays(make_config: Make, poison: float) -> None:
    config = make_config()
    batches, state = data.batches(config), init_state(config)
    state, _ = jitted_train_step(state, jnp.asarray(batches[0]), config=config)
    before = jax.device_get(state)
    weights = jnp.asarray([1.0, poison, 1.0, 1.0])
    state, metrics = jitted_train_step(state, jnp.asarray(batches[1]), weights, config=config)
    assert metrics["halted"] and not metrics["updated"]
    # The next step is under way before anybody has seen this one; it must change nothing.
    state, metrics = jitted_train_step(state, jnp.asarray(batches[2]), config=config)
    assert metrics["halted"] and not metrics["updated"]
    assert state.halted
    assert_same_bits(state.replace(halted=before.halted), before)


def test_in_skip_mode_the_batch_is_passed_over(make_config: Make) -> None:
    config = make_config(training={"on_nonfinite": "skip"})
    batches, state = data.batches(config), init_state(config)
    state, _ = jitted_train_step(state, jnp.asarray(batches[0]), config=config)
    before = jax.device_get(state)
    weights = jnp.asarray([1.0, np.nan, 1.0, 1.0])
    state, metrics = jitted_train_step(state, jnp.asarray(batches[1]), weights, config=config)
    assert not metrics["halted"] and not metrics["updated"]
    assert state.step == 2 and state.updates == 1
    assert_same_bits((state.params, state.opt_state), (before.params, before.opt_state))
    state, metrics = jitted_train_step(state, jnp.asarray(batches[2]), config=config)
    assert metrics["updated"] and state.step == 3 and state.updates == 2


@pytest.fixture
def broken_at_seven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch 7 gives no number: one of its rows weighs infinitely much."""
    real = trainer.jitted_train_step

    def step(state, tokens, *, config):
        weights = jnp.where(jnp.asarray([0, 1, 0, 0]) * (state.step == 7) > 0, jnp.inf, 1.0)
        return real(state, tokens, weights, config=config)

    monkeypatch.setattr(trainer, "jitted_train_step", step)


@pytest.mark.usefixtures("broken_at_seven")
def test_a_run_stops_and_tells_step_batch_and_norms(make_config: Make) -> None:
    config = make_config()
    with pytest.raises(NonFiniteError, match=r"nonfinite-7\.json") as raised:
        train(config, show_progress=False)
    assert raised.value.step == 7
    folder = Path(config.checkpoint.directory)
    lines = read_metrics(folder / "metrics.jsonl")
    assert max(line["step"] for line in lines) == 6
    told = json.loads((folder / "nonfinite-7.json").read_text())
    assert told["step"] == 7
    assert told["batch_sha256"] == hashlib.sha256(data.batches(config)[7].tobytes()).hexdigest()
    for kind in ("parameter_norms", "gradient_norms"):
        assert set(told[kind]) == {p.path for p in parameters.TABLE}
        assert len(told[kind]["layers/mlp/dense_h_to_4h/kernel"]) == 2
    # The state is whole: the run goes on from its newest checkpoint when the fault is gone.
    kept = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())
    assert kept == [0, 1, 2, 4, 5]


@pytest.mark.usefixtures("broken_at_seven")
def test_a_run_may_skip_instead(make_config: Make) -> None:
    config = make_config(training={"on_nonfinite": "skip"})
    result = train(config, show_progress=False)
    lines = {line["step"]: line for line in read_metrics(result.folder / "metrics.jsonl")}
    assert lines[7]["skipped"] is True and "loss" not in lines[7]
    assert result.state.step == 20 and result.state.updates == 19
    # The schedule counts updates: step 8 takes the rate that the skipped step did not use.
    rates = learning_rate(config.optimizer, 20)
    assert lines[6]["learning_rate"] == rates(6) and lines[8]["learning_rate"] == rates(7)
