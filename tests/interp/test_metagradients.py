"""Influence through training against training again: finite differences, and rows left out."""

import functools
import logging
import runpy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from on_a_mesh import on_eight_devices

from pythia_jax import configs
from pythia_jax.configs import RunConfig, Runtime
from pythia_jax.interp import metagradients, preflight
from pythia_jax.interp.metagradients import metagradient, trained
from pythia_jax.model.loss import loss
from pythia_jax.training.step import TrainState, init_state, train_step

VOCABULARY, SEQ, BATCH, BEFORE = 61, 9, 4, 2
F64 = Runtime(dtype="float64", attention="einsum")
F32 = Runtime(dtype="float32", attention="einsum")
NUMBER = np.random.default_rng(0)
TOKENS = NUMBER.integers(0, VOCABULARY - 1, (BEFORE + 3, BATCH, SEQ + 1)).astype(np.int32)
"""Of two steps before, and three that are differentiated. The last token never occurs."""
QUERIES = NUMBER.integers(0, VOCABULARY - 1, (2, 3, SEQ + 1)).astype(np.int32)


def make_config(clip: float, parts: int, **training: Any) -> RunConfig:
    return configs.from_dict(
        {
            "model": {
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "vocab_size": VOCABULARY,
                "max_position_embeddings": 16,
            },
            "data": {"sequence_length": SEQ},
            "optimizer": {
                "warmup_fraction": 0.1,
                "peak_learning_rate": 1e-2,
                "gradient_clip": clip,
            },
            "training": {
                "steps": 20,
                "batch_size": BATCH,
                "gradient_accumulation": parts,
                "precision": "float32",
                "remat": "none",
                **training,
            },
        }
    )


CLIPPED = make_config(clip=0.5, parts=2, on_nonfinite="skip")
WHOLE = make_config(clip=1e6, parts=1, on_nonfinite="stop")


# One function and one state for all tests, so that each program is compiled once.
@functools.cache
def query_losses(runtime: Runtime) -> Callable[[Any], jax.Array]:
    assert WHOLE.model is not None
    model = WHOLE.model
    return lambda params: jnp.stack([loss(params, q, model, runtime=runtime) for q in QUERIES])


@pytest.fixture(autouse=True)
def double(request: pytest.FixtureRequest) -> Iterator[None]:
    with jax.enable_x64("float32" not in request.node.name):
        yield


@functools.cache
def start(config: RunConfig) -> TrainState:
    """A state in float64 whose moments have seen two batches."""

    def wide(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    state = jax.tree.map(wide, jax.jit(init_state, static_argnums=0)(config))
    ones = np.ones((BEFORE, BATCH))
    return trained(state, TOKENS[:BEFORE], ones, config, runtime=F64)


def finite_differences(
    state: TrainState, tokens: np.ndarray, config: RunConfig, step: float = 1e-4
) -> np.ndarray:
    """Central differences of training again with one weight changed, `[query, step, batch]`."""
    losses = jax.jit(query_losses(F64))
    out = np.zeros((len(QUERIES), *tokens.shape[:2]))
    for at in np.ndindex(*tokens.shape[:2]):
        for sign in (1, -1):
            weights = np.ones(tokens.shape[:2])
            weights[at] += sign * step
            after = trained(state, tokens, weights, config, runtime=F64)
            out[:, *at] += sign * np.asarray(losses(after.params)) / (2 * step)
    return out


@pytest.mark.parametrize(("config", "steps"), [(CLIPPED, 3), (WHOLE, 1)], ids=["clipped", "whole"])
def test_influence_equals_finite_differences_of_training_again(
    config: RunConfig, steps: int
) -> None:
    state, tokens = start(config), TOKENS[BEFORE:][:steps]
    norm = train_step(state, tokens[0], config=replace_runtime(config))[1]["grad_norm"]
    assert (norm > config.optimizer.gradient_clip) == (config is CLIPPED)
    unseen = state.opt_state[1].nu["embed_in"]["embedding"][VOCABULARY - 1]
    assert not unseen.any(), "no second moment is 0, so its square root was not tried"
    got = metagradient(state, tokens, query_losses(F64), steps=steps, config=config, runtime=F64)
    assert got.shape == (2, steps, BATCH)
    wanted = finite_differences(state, tokens, config)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    assert np.linalg.norm(got - wanted) <= 1e-6 * np.linalg.norm(wanted)


def replace_runtime(config: RunConfig) -> RunConfig:
    """The config for calling the train step itself, with the attention of these tests."""
    return replace(config, training=replace(config.training, attention="einsum"))


def test_weights_of_1_retrace_the_run_step_by_step() -> None:
    state, config = start(WHOLE), replace_runtime(WHOLE)
    state = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x, state)
    again = trained(state, TOKENS[BEFORE:], np.ones((3, BATCH)), config)
    for tokens in TOKENS[BEFORE:]:
        state, _ = jax.jit(train_step, static_argnames="config")(state, tokens, config=config)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_batches_by_number_and_one_query_give_the_same_influence(
    caplog: pytest.LogCaptureFixture,
) -> None:
    state = start(WHOLE)
    array = metagradient(
        state, TOKENS[BEFORE:][:1], query_losses(F64), steps=1, config=WHOLE, runtime=F64
    )
    numbered = metagradient(
        state, TOKENS.__getitem__, query_losses(F64), steps=1, config=WHOLE, runtime=F64
    )
    np.testing.assert_array_equal(array, numbered)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        first = metagradient(
            state,
            TOKENS.__getitem__,
            lambda params: query_losses(F64)(params)[0],
            steps=1,
            config=WHOLE,
            runtime=F64,
        )
    # Planned before they are run, and compiled once all the same; what was there is taken.
    for name, times in {"_forward": 0, "_backward": 1, "_query_gradients": 1}.items():
        made = f"Finished XLA compilation of jit({name})"
        assert sum(made in line for line in caplog.messages) == times, name
    assert first.shape == (1, BATCH)
    np.testing.assert_allclose(first, array[0], rtol=1e-12)


def test_a_skipped_step_has_no_influence_and_a_stopped_one_is_refused() -> None:
    def poisoned(config: RunConfig) -> TrainState:
        state = start(config)
        table = state.params["embed_in"]["embedding"].at[VOCABULARY - 1].set(np.nan)
        return state.replace(params={**state.params, "embed_in": {"embedding": table}})  # type: ignore

    tokens = TOKENS[BEFORE:].copy()
    tokens[1, 2, 3] = VOCABULARY - 1
    state, query = poisoned(CLIPPED), query_losses(F64)
    got = metagradient(state, tokens, query, steps=3, config=CLIPPED, runtime=F64)
    assert (np.asarray(got)[:, 1] == 0).all()
    wanted = finite_differences(state, tokens, CLIPPED)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    with pytest.raises(ValueError, match="step 2 made no update"):
        metagradient(poisoned(WHOLE), tokens[1:2], query, steps=1, config=WHOLE, runtime=F64)


@pytest.mark.slow
def test_in_float32_influence_is_that_of_float64() -> None:
    with jax.enable_x64(True):
        state, tokens = start(CLIPPED), TOKENS[BEFORE:]
        run = {"steps": 3, "config": CLIPPED}
        wanted = metagradient(state, tokens, query_losses(F64), **run, runtime=F64)
    narrow = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, state)
    got = metagradient(narrow, tokens, query_losses(F32), **run, runtime=F32)
    assert got.dtype == np.float32
    assert np.linalg.norm(got - wanted) <= 1e-3 * np.linalg.norm(wanted)


def test_an_influence_that_is_no_number_is_refused_with_its_step() -> None:
    def broken(params: Any) -> jax.Array:
        return query_losses(F64)(params) * jnp.nan

    with pytest.raises(ValueError, match="of step 2 is not finite"):
        metagradient(start(WHOLE), TOKENS[BEFORE:][:1], broken, steps=1, config=WHOLE, runtime=F64)


def test_what_cannot_be_differentiated_or_does_not_fit_is_refused() -> None:
    state = init_state(WHOLE)

    def refused(words: str, tokens: Any = TOKENS[:1], steps: int = 1, **changes: Any) -> None:
        config = changes.pop("config", WHOLE)
        with pytest.raises(ValueError, match=words):
            metagradient(
                state,
                tokens,
                changes.pop("query", query_losses(F32)),
                steps=steps,
                config=config,
                **changes,
            )

    refused("first derivatives only", runtime=Runtime(attention="splash"))
    refused("too narrow", config=make_config(1, 1, precision="float16"))
    refused("2 batches for 1 steps", tokens=TOKENS[:2])
    refused("steps = 0", steps=0)
    refused(r"gradient_accumulation \(2\)", tokens=TOKENS[:1, :3], config=CLIPPED)
    refused("the run ends at 20", tokens=np.repeat(TOKENS[:1], 21, axis=0), steps=21)
    refused("not in the vocabulary", tokens=TOKENS[:1] + VOCABULARY)
    refused(r"\[queries\] of them", query=lambda params: params["embed_in"]["embedding"])
    with pytest.raises(ValueError, match="one a row"):
        trained(state, TOKENS[:1], np.ones((1, BATCH + 1)), WHOLE)


def test_what_does_not_fit_is_refused_with_the_numbers_before_any_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = init_state(WHOLE)
    # Of 3 steps, the states at the beginnings of 2 segments; and a gradient for each of 2 queries.
    sizes = [sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (state, state.params)]
    wanted = 2 * sizes[0] + 2 * sizes[1]
    monkeypatch.setattr(preflight, "host_memory", lambda: wanted - 1)
    monkeypatch.setattr(metagradients, "_forward", None)
    told = f"through 3 steps takes {preflight.in_bytes(wanted)} of memory .* are free; take fewer"
    with pytest.raises(MemoryError, match=told):
        metagradient(state, TOKENS[BEFORE:], query_losses(F32), steps=3, config=WHOLE)


@pytest.mark.slow
def test_eight_devices_find_what_one_does() -> None:
    script = Path(__file__).with_name("second_order_on_a_mesh.py")
    found = on_eight_devices(script, x64=True)
    assert max(found.values()) <= 1e-10, found


@pytest.mark.slow
def test_influence_foretells_what_leaving_rows_out_does() -> None:
    """The benchmark's own task: 1.2 M parameters, batch 16, 20 steps, 104 rows, 3 queries."""
    script = Path(__file__).parents[2] / "benchmarks" / "leave_one_out.py"
    loo = SimpleNamespace(**runpy.run_path(str(script)))
    config = loo.make_config(width=224, layers=2, batch=16, seq=128, rate=1e-4)
    task = loo.make_task(config, start=400, steps=20, queries=3)
    truth, foretold, _ = loo.compare(task, 104, {"metagradient": loo.by_metagradient})
    assert (truth.std(axis=1) > 10 * loo.noise(task)).all(), "nothing but rounding was compared"
    for kind in (loo.pearson, loo.spearman):
        for scores, changes in zip(foretold["metagradient"], truth, strict=True):
            assert kind(scores, changes) >= 0.98
