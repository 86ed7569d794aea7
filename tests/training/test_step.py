"""The train step against torch, and against itself cut up in other ways."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import hf_model

from pythia_jax import data
from pythia_jax.configs import RunConfig
from pythia_jax.training.step import init_state, train_step


def annealed(n: int, config: RunConfig) -> float:
    """The rate of update n as GPT-NeoX v1.0's AnnealingLR has it, with "cosine" as its style."""
    start_lr, min_lr = config.optimizer.peak_learning_rate, config.optimizer.min_learning_rate
    end_iter = config.training.steps
    warmup_iter = config.optimizer.warmup_fraction * end_iter
    num_iters_ = min(n, end_iter - warmup_iter)
    if warmup_iter > 0 and n <= warmup_iter:
        return start_lr * num_iters_ / warmup_iter
    num_iters_ = num_iters_ - warmup_iter
    lr = start_lr / 2.0 * (math.cos(math.pi * num_iters_ / end_iter) + 1)
    return max(lr, min_lr)


def torch_losses(params: dict, config: RunConfig, steps: int) -> list[float]:
    """Losses of a plain torch loop with the semantics of GPT-NeoX v1.0."""
    assert config.model is not None
    model = hf_model(params, config.model).train()
    batches = data.batches(config)
    named = list(model.named_parameters())
    m = [torch.zeros_like(p) for _, p in named]
    v = [torch.zeros_like(p) for _, p in named]
    losses = []
    for n in range(steps):
        tokens = torch.tensor(batches[n]).long()
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1)
        )
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            norm = torch.sqrt(sum((p.grad**2).sum() for _, p in named))  # type: ignore
            clip = max(1.0, float(norm) + 1e-6)
            for (name, p), m_, v_ in zip(named, m, v, strict=True):
                assert p.grad is not None
                g = p.grad / clip
                m_.mul_(0.9).add_(0.1 * g)
                v_.mul_(0.95).add_(0.05 * g * g)
                # The counter is one ahead: the k-th update is corrected as the (k+1)-th.
                k = n + 2
                update = (m_ / (1 - 0.9**k)) / ((v_ / (1 - 0.95**k)).sqrt() + 1e-8)
                decayed = not (name.endswith("bias") or "norm" in name)
                p -= annealed(n, config) * (update + (0.1 * p if decayed else 0))
    return losses


def our_losses(config: RunConfig, steps: int) -> list[float]:
    state = jax.jit(init_state, static_argnums=0)(config)
    step = jax.jit(partial(train_step, config=config))
    losses = []
    for n in range(steps):
        state, metrics = step(state, data.batches(config)[n])
        losses.append(float(metrics["loss"]))
    return losses


def test_20_steps_follow_a_torch_reference(make_config: Callable[..., RunConfig]) -> None:
    config = make_config()
    start = jax.jit(init_state, static_argnums=0)(config)
    ours, theirs = our_losses(config, 20), torch_losses(start.params, config, 20)
    assert ours[0] - ours[-1] > 0.1, "nothing was learned, so nothing was compared"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_20_steps_at_the_14m_shape_follow_a_torch_reference(
    make_config: Callable[..., RunConfig],
) -> None:
    shape = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = make_config(model=shape)
    start = jax.jit(init_state, static_argnums=0)(config)
    np.testing.assert_allclose(
        our_losses(config, 20), torch_losses(start.params, config, 20), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_microbatches_equal_one_batch(
    make_config: Callable[..., RunConfig], parts: int
) -> None:
    whole = our_losses(make_config(), 10)
    cut = our_losses(make_config(training={"gradient_accumulation": parts}), 10)
    np.testing.assert_allclose(cut, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_no_loss(
    make_config: Callable[..., RunConfig], remat: str
) -> None:
    np.testing.assert_allclose(
        our_losses(make_config(training={"remat": remat}), 5),
        our_losses(make_config(), 5),
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("parts", [1, 2])
def test_weights_scale_the_rows_and_leave_the_divisor(
    make_config: Callable[..., RunConfig], parts: int
) -> None:
    config = make_config(training={"gradient_accumulation": parts})
    state, tokens = init_state(config), jnp.asarray(data.batches(config)[0])
    step = partial(train_step, config=config)
    _, plain = step(state, tokens)
    _, ones = step(state, tokens, jnp.ones(4))
    _, half = step(state, tokens, jnp.array([1.0, 1.0, 0.0, 0.0]))
    _, rest = step(state, tokens, jnp.array([0.0, 0.0, 1.0, 1.0]))
    assert float(ones["loss"]) == float(plain["loss"])
    assert float(half["loss"] + rest["loss"]) == pytest.approx(float(plain["loss"]), abs=1e-6)


def test_bfloat16_compute_keeps_float32_weights_and_stays_near(
    make_config: Callable[..., RunConfig],
) -> None:
    config = make_config(training={"precision": "bfloat16"})
    state = init_state(config)
    state, _ = train_step(state, jnp.asarray(data.batches(config)[0]), config=config)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    np.testing.assert_allclose(our_losses(config, 10), our_losses(make_config(), 10), atol=0.03)
