"""Schedule and update against GPT-NeoX v1.0's published numbers and a reference written out."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pythia_jax import suite
from pythia_jax.configs import OptimizerConfig
from pythia_jax.model.parameters import TABLE, tree
from pythia_jax.training.optimizer import (
    clip_by_global_norm,
    learning_rate,
    optimizer,
    restarted,
    scale_by_adam,
)

STEPS = 143_000
# lr(n) of update n of pythia-70m, by GPT-NeoX v1.0's own AnnealingLR.
PUBLISHED = {
    0: 0.0,
    1: 6.993006993006994e-07,
    2: 1.3986013986013987e-06,
    512: 0.00035804195804195807,
    1000: 0.0006993006993006993,
    1430: 0.001,
    1431: 0.0009999999998793387,
    10000: 0.0009911641965803597,
    50000: 0.0007413579850981182,
    71500: 0.000515705379539064,
    100000: 0.00021986750263500399,
    115138: 0.00010000602830071032,
    115139: 0.0001,
    142999: 0.0001,
}


@pytest.mark.parametrize("size", suite.SUITE)
def test_learning_rates_are_those_of_gpt_neox_for_every_size(size: str) -> None:
    entry = suite.SUITE[size]
    config = OptimizerConfig(
        peak_learning_rate=entry.peak_learning_rate, min_learning_rate=entry.min_learning_rate
    )
    schedule = learning_rate(config, STEPS)
    for update, rate in PUBLISHED.items():
        assert float(schedule(update)) == pytest.approx(
            rate * entry.peak_learning_rate / 1e-3, rel=1e-15, abs=0
        )


def test_all_rates_of_a_run_sum_to_the_published_figure_and_rest_on_the_floor() -> None:
    rates = learning_rate(OptimizerConfig(), STEPS)(np.arange(STEPS))
    assert math.fsum(rates) == pytest.approx(74.01100997620222, rel=1e-15)
    assert (rates == 1e-4).sum() == 27_862  # one of them passed by in the warm-up
    assert (rates[115_139:] == 1e-4).all() and rates[115_138] > 1e-4


# The same by the formula that GPT-NeoX has had since August 2023.
LATER = {50_000: 0.0007629620, 71_500: 0.0005571397, 100_000: 0.0002897885, 115_138: 0.0001833076}


def test_later_cosine_has_the_rates_of_later_gpt_neox() -> None:
    schedule = learning_rate(OptimizerConfig(schedule="cosine"), STEPS)
    for update, rate in LATER.items():
        assert float(schedule(update)) == pytest.approx(rate, rel=1e-6)
        assert abs(PUBLISHED.get(update, 0) - rate) > 1e-5, "both schedules have it"
    for update in (0, 1, 1000, 1430):
        assert float(schedule(update)) == PUBLISHED[update]
    rates = schedule(np.arange(STEPS))
    assert (np.diff(rates[1430:]) < 0).all() and 1e-4 < rates[-1] < 1.000001e-4


def test_both_schedules_rest_after_the_steps_that_they_are_laid_out_over() -> None:
    """As in the 4-million-token runs of v0: 71,500 steps, a schedule over 71,250."""
    config = OptimizerConfig(decay_steps=71_250)
    rates = learning_rate(config, 71_500)(np.arange(71_500))
    whole = learning_rate(OptimizerConfig(), 71_250)(np.arange(71_250))
    np.testing.assert_array_equal(rates[:71_250], whole)
    assert (rates[71_250:] == 1e-4).all()
    assert rates.argmax() == 713 and rates[712] == pytest.approx(1e-3 * 712 / 712.5, rel=1e-12)
    later = learning_rate(OptimizerConfig(schedule="cosine", decay_steps=71_250), 71_500)
    np.testing.assert_allclose(later(np.arange(71_250, 71_500)), 1e-4, rtol=1e-12)


def test_without_a_floor_neox_v1_ends_a_little_above_0() -> None:
    """6.9b and 12b of v0: clamped 1430 steps before the end, at 9.9e-4 of the peak."""
    config = OptimizerConfig(peak_learning_rate=1.2e-4, min_learning_rate=0.0)
    rates = learning_rate(config, STEPS)(np.arange(STEPS))
    tail = 1.2e-4 * (1 + math.cos(0.98 * math.pi)) / 2
    assert tail / 1.2e-4 == pytest.approx(9.87e-4, rel=1e-3)
    np.testing.assert_allclose(rates[STEPS - 1430 :], tail, rtol=1e-9)
    assert rates[STEPS - 1431] > tail * (1 + 1e-9)


def test_warmup_may_begin_with_the_second_rate() -> None:
    config = OptimizerConfig(warmup_from_zero=False)
    rates = learning_rate(config, STEPS)(np.arange(STEPS))
    assert rates[0] == rates[1] == PUBLISHED[1]
    np.testing.assert_array_equal(
        rates[1:], learning_rate(OptimizerConfig(), STEPS)(np.arange(1, STEPS))
    )
    # A warm-up shorter than one update: the first has the peak, and no more.
    assert float(learning_rate(config, 20)(0)) == 1e-3


def test_every_update_uses_the_float64_schedule_rounded_once() -> None:
    # A parameter of 1 without a gradient moves by its decay alone: minus the rate, to the bit.
    transform = optimizer(OptimizerConfig(weight_decay=1.0), STEPS)
    params = _leaves(1.0)
    start, still = transform.init(params), _leaves(0.0)

    def rate(update: jax.Array) -> jax.Array:
        state = optax.tree_utils.tree_set(start, count=update)
        updates: Any = transform.update(still, state, params)[0]
        return -updates["embed_out"]["kernel"][0]

    used = np.asarray(jax.jit(jax.vmap(rate))(jnp.arange(STEPS)))
    logged = learning_rate(OptimizerConfig(), STEPS)(np.arange(STEPS))
    assert used.dtype == np.float32
    np.testing.assert_array_equal(used, logged.astype(np.float32))


def test_without_warmup_the_first_update_has_the_peak_rate() -> None:
    schedule = learning_rate(OptimizerConfig(warmup_fraction=0.0), 100)
    assert float(schedule(0)) == 1e-3


def _leaves(value: float) -> dict:
    return tree(lambda p: jnp.full((3,), value))


def test_updates_follow_adamw_with_correction_one_step_ahead_and_clipping() -> None:
    config = OptimizerConfig(warmup_fraction=0.1, gradient_clip=1.0)
    transform = optimizer(config, steps=10)
    schedule = learning_rate(config, 10)
    rng = np.random.default_rng(1)
    params = tree(lambda p: jnp.asarray(rng.standard_normal(3), jnp.float32))
    expected = {p: np.asarray(v, np.float64) for p, v in _flat(params).items()}
    m = {p: np.zeros(3) for p in expected}
    v = {p: np.zeros(3) for p in expected}
    state = transform.init(params)
    for k in range(1, 8):
        scale = 0.01 if k == 3 else 2.0  # once below the clip
        gradients = tree(lambda p, s=scale: jnp.asarray(s * rng.standard_normal(3), jnp.float32))
        updates, state = transform.update(gradients, state, params)
        params = jax.tree.map(jnp.add, params, updates)

        flat = {p: np.asarray(g, np.float64) for p, g in _flat(gradients).items()}
        norm = math.sqrt(sum((g**2).sum() for g in flat.values()))
        clip = max(1.0, norm + 1e-6)
        rate = float(schedule(k - 1))
        for parameter in TABLE:
            path = parameter.path
            g = flat[path] / clip
            m[path] = 0.9 * m[path] + 0.1 * g
            v[path] = 0.95 * v[path] + 0.05 * g * g
            ahead = k + 1
            step = (m[path] / (1 - 0.9**ahead)) / (np.sqrt(v[path] / (1 - 0.95**ahead)) + 1e-8)
            decay = 0.1 if parameter.path.split("/")[-1] in ("kernel", "embedding") else 0.0
            expected[path] = expected[path] - rate * (step + decay * expected[path])
    for path, value in _flat(params).items():
        np.testing.assert_allclose(value, expected[path], rtol=0, atol=2e-6)


@pytest.mark.parametrize("norm", [8.5e-6, 9.5e-6, 2e-5, 1e-3])
def test_the_clip_adds_a_millionth_to_the_norm(norm: float) -> None:
    # 9.5e-6 lies below a largest norm of 1e-5, and above it with the millionth added.
    gradients = {"a": jnp.array([0.6 * norm]), "b": jnp.array([0.8 * norm])}
    clip = clip_by_global_norm(1e-5)
    clipped: Any = clip.update(gradients, clip.init(gradients))[0]
    factor = 1 / max(1.0, (norm + 1e-6) / 1e-5)
    np.testing.assert_allclose(clipped["a"], [0.6 * norm * factor], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], [0.8 * norm * factor], rtol=1e-6)


@pytest.mark.parametrize("eps", [1e-8, 1e-6])
def test_eps_is_added_to_the_root(eps: float) -> None:
    adam = scale_by_adam(OptimizerConfig(eps=eps))
    g = np.array([1e-8, -3e-8, 1e-7])
    gradient = {"a": jnp.asarray(g, jnp.float32)}
    updates: Any = adam.update(gradient, adam.init(gradient))[0]
    # The first real update is corrected as the second.
    m, v = 0.1 * g / (1 - 0.9**2), 0.05 * g * g / (1 - 0.95**2)
    np.testing.assert_allclose(updates["a"], m / (np.sqrt(v) + eps), rtol=1e-5)


@pytest.mark.parametrize(("ahead", "factor"), [(True, 1.64), (False, 2.24)])
def test_an_update_after_a_restart_is_too_long(ahead: bool, factor: float) -> None:
    """Grown moments of a steady gradient, corrected as if they were new."""
    config = OptimizerConfig(bias_correction_ahead=ahead, restarts=(200, 300))
    adam = scale_by_adam(config)
    gradient = {"a": jnp.full(3, 0.5)}
    state = adam.init(gradient)
    sizes = []
    for step in range(301):
        _, state = restarted(config, (None, state), jnp.int32(step))
        updates, state = adam.update(gradient, state)
        sizes.append(float(np.asarray(updates["a"])[0]))  # type: ignore
    np.testing.assert_allclose(sizes[150:200], 1.0, atol=1e-3)
    assert sizes[200] == pytest.approx(factor, abs=5e-3)
    assert sizes[300] == pytest.approx(sizes[200], rel=1e-4)
    assert sizes[200] > sizes[201] > sizes[205] > 1 and sizes[299] == pytest.approx(1, abs=1e-2)


def test_without_restarts_the_state_is_not_touched() -> None:
    state = (None, scale_by_adam(OptimizerConfig()).init({"a": jnp.zeros(1)}))
    assert restarted(OptimizerConfig(), state, jnp.int32(1)) is state


def test_the_first_update_changes_nothing() -> None:
    transform = optimizer(OptimizerConfig(), steps=1000)
    params = _leaves(0.5)
    updates, _ = transform.update(_leaves(1.0), transform.init(params), params)
    assert all((np.asarray(u) == 0).all() for u in jax.tree.leaves(updates))


def _flat(params: dict) -> dict:
    from flax import traverse_util

    return traverse_util.flatten_dict(params, sep="/")
