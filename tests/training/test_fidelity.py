"""Every switch of the recipe, on and off: real train steps against NumPy, from their gradients.

The reference is written from the formulas of GPT-NeoX v1.0, in float64: apex's AdamW, DeeperSpeed's
clip and counters, AnnealingLR, and biases of which every model-parallel rank holds a copy.
"""

import dataclasses
import math
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import TINY, random_params
from small_runs import Make

from pythia_jax import data
from pythia_jax.configs import DataConfig, RunConfig
from pythia_jax.model.gptneox import forward
from pythia_jax.model.parameters import items
from pythia_jax.training import step
from pythia_jax.training.step import init_state, loss_and_gradients

PEAK, FLOOR, STEPS, WARMUP = 1e-2, 1e-3, 10, 4
BASE = {
    "peak_learning_rate": PEAK,
    "min_learning_rate": FLOOR,
    "warmup_fraction": 0.4,
}
TRAINING = {"steps": STEPS}
ROW_PARALLEL = ("layers/attention/dense/bias", "layers/mlp/dense_4h_to_h/bias")
Tree = dict[str, np.ndarray]


def neox_v1(n: int, total: int = STEPS) -> float:
    """AnnealingLR of GPT-NeoX v1.0."""
    warmup = 0.4 * total
    if n <= warmup:
        return PEAK * n / warmup
    annealed = min(n, total - warmup) - warmup
    return max(PEAK / 2 * (1 + math.cos(math.pi * annealed / total)), FLOOR)


def later(n: int) -> float:
    """AnnealingLR since August 2023."""
    if n <= WARMUP:
        return PEAK * n / WARMUP
    turn = math.pi * (n - WARMUP) / (STEPS - WARMUP)
    return FLOOR + (PEAK - FLOOR) / 2 * (1 + math.cos(turn))


def trained(
    start: Tree,
    gradients: list[Tree],
    *,
    rate: Any = neox_v1,
    counter: int = 1,
    restarts: tuple[int, ...] = (),
    ranks: int = 1,
    clip: float = 1.0,
) -> Tree:
    """The parameters after steps with these gradients of theirs.

    counter: of Adam, when it is made; the first update then adds one. ranks: of model parallelism:
    each has copies of the row-parallel biases, all with the gradient of their sum.
    """
    # A copy on each rank; other parameters have one.
    copies = {
        p: np.stack([x / ranks] * ranks) if p in ROW_PARALLEL else x[None]
        for p, x in ((p, np.asarray(x, np.float64)) for p, x in start.items())
    }
    m = {p: np.zeros_like(x) for p, x in copies.items()}
    v = {p: np.zeros_like(x) for p, x in copies.items()}
    count = counter
    for n, gradient in enumerate(gradients):
        if n in restarts:
            count = counter  # the moments are loaded, the counter is not
        count += 1
        # Copies count once, on rank 0.
        norm = math.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in gradient.values()))
        for path, own in copies.items():
            g = np.asarray(gradient[path], np.float64)[None] / max(1.0, (norm + 1e-6) / clip)
            m[path] = 0.9 * m[path] + 0.1 * g
            v[path] = 0.95 * v[path] + 0.05 * g * g
            update = m[path] / (1 - 0.9**count) / (np.sqrt(v[path] / (1 - 0.95**count)) + 1e-8)
            decay = 0.1 if path.endswith(("kernel", "embedding")) else 0.0
            copies[path] = own - rate(n) * (update + decay * own)
    return {path: own.sum(0) for path, own in copies.items()}


def flat(params: Any) -> Tree:
    return {parameter.path: np.asarray(value) for parameter, value in items(params)}


jitted_gradients = jax.jit(loss_and_gradients, static_argnames="config")


def run(config: RunConfig, steps: int = STEPS, state: Any = None) -> tuple[Tree, list[Tree], Tree]:
    """Parameters before, the gradient that each step took, and parameters after.

    The step is not compiled whole, so that the model is compiled once for all optimizers.
    """
    gradients = []
    shared = RunConfig(
        model=config.model,
        data=DataConfig(sequence_length=config.data.sequence_length),
        training=config.training,
    )

    def captured(params: Any, tokens: Any, weights: Any, scale: Any, *, config: RunConfig) -> Any:
        value, found = jitted_gradients(params, tokens, weights, scale, config=shared)
        divisor = 1 if scale is None else float(scale)
        gradients.append({path: g / divisor for path, g in flat(found).items()})
        return value, found

    batches = data.batches(config)
    state = init_state(config) if state is None else state
    start = flat(state.params)
    with mock.patch.object(step, "loss_and_gradients", captured):
        for n in range(steps):
            state, metrics = step.train_step(state, jnp.asarray(batches[n]), config=config)
            assert metrics["updated"]
    return start, gradients, flat(state.params)


def furthest(a: Tree, b: Tree) -> float:
    return max(float(np.abs(a[path] - b[path]).max()) for path in a)


SWITCHES = {
    "as it was trained": ({}, {}),
    "later cosine": ({"schedule": "cosine"}, {"rate": later}),
    "schedule over fewer steps": (
        {"decay_steps": 5},
        {"rate": partial(neox_v1, total=5)},
    ),
    "first update not 0": (
        {"warmup_from_zero": False},
        {"rate": lambda n: neox_v1(max(1, n))},
    ),
    "ordinary bias correction": ({"bias_correction_ahead": False}, {"counter": 0}),
    "restarts": ({"restarts": [3, 8]}, {"restarts": (3, 8)}),
    "restarts, ordinary correction": (
        {"restarts": [3, 8], "bias_correction_ahead": False},
        {"restarts": (3, 8), "counter": 0},
    ),
    "row-parallel biases of four ranks": ({"row_parallel_bias_multiple": 4}, {"ranks": 4}),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_steps_are_those_of_the_reference_and_not_of_another_switch(
    make_config: Make, switch: str
) -> None:
    keys, reference = SWITCHES[switch]
    config = make_config(optimizer={**BASE, **keys}, training=TRAINING)
    start, gradients, found = run(config)
    expected = trained(start, gradients, **reference)
    assert furthest(found, expected) < 2e-6
    for other, (_, without) in SWITCHES.items():
        if other != switch:
            assert furthest(found, trained(start, gradients, **without)) > 1e-4, other


def test_row_parallel_biases_alone_learn_faster(make_config: Make) -> None:
    ends = {}
    for multiple in (1, 2):
        optimizer = {**BASE, "row_parallel_bias_multiple": multiple}
        config = make_config(optimizer=optimizer, training=TRAINING)
        # The first update has rate 0; until the next, gradients are the same.
        ends[multiple] = run(config, steps=2)[2]
    for path, once in ends[1].items():
        if path in ROW_PARALLEL:
            assert np.abs(once).max() > 1e-4
            np.testing.assert_allclose(ends[2][path], 2 * once, rtol=1e-6)
        else:
            np.testing.assert_array_equal(ends[2][path], once)


@pytest.mark.parametrize("quirk", [True, False])
def test_where_the_loss_scale_doubles_the_gradient_counts_half_or_whole(
    make_config: Make, quirk: bool
) -> None:
    """The scale doubles 1000 steps after the last overflow: here at the fourth of six."""
    config = make_config(
        # No clip, which would bring the halved gradient and the whole one to the same length.
        optimizer={**BASE, "gradient_clip": 1e3},
        training={**TRAINING, "precision": "float16", "doubled_scale_quirk": quirk},
    )
    state = init_state(config)
    assert state.loss_scale is not None
    overflow = state.loss_scale.replace(last_overflow=jnp.int32(3 - 1000))  # type: ignore
    start, gradients, found = run(config, 6, state.replace(loss_scale=overflow))  # type: ignore
    halved = [{p: g / 2 for p, g in gradient.items()} for gradient in gradients]
    halved = [*gradients[:3], halved[3], *gradients[4:]]
    right, wrong = (halved, gradients) if quirk else (gradients, halved)
    near = furthest(found, trained(start, right, clip=1e3))
    far = furthest(found, trained(start, wrong, clip=1e3))
    assert far > 1e-3 and near < far / 50


ACTIVATIONS = {
    "gelu": lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    # The constants of megatron/model/activations.py.
    "gelu_pytorch_tanh": lambda x: x / 2 * (1 + np.tanh(0.79788456 * x * (1 + 0.044715 * x * x))),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_activation_is_the_exact_one_or_that_by_tanh(name: str) -> None:
    model = dataclasses.replace(TINY, hidden_act=name)
    tokens = np.arange(64).reshape(2, 32)
    # Wide enough that the two forms differ, by up to 5e-4 near 2.
    params = jax.tree.map(lambda x: 10 * x, random_params(model))
    _, sites = forward(params, jnp.asarray(tokens), model, capture=("mlp.pre", "mlp.post"))
    before, after = (np.asarray(sites[site], np.float64) for site in ("mlp.pre", "mlp.post"))
    assert np.abs(after - ACTIVATIONS[name](before)).max() < 2e-5
    (other,) = ACTIVATIONS.keys() - {name}
    assert np.abs(after - ACTIVATIONS[other](before)).max() > 3e-4
