"""Loss spikes: told once, and told from noise and from learning."""

import math

import numpy as np
import pytest

from pythia_jax.training.spikes import SpikeWatch


def warned(losses: list[float], caplog: pytest.LogCaptureFixture) -> list[int]:
    """Steps at which a series of losses is warned of."""
    watch = SpikeWatch()
    for step, loss in enumerate(losses):
        watch.look(step, loss)
    return [int(record.getMessage().split()[1].rstrip(":")) for record in caplog.records]


def noisy(levels: list[float]) -> list[float]:
    rng = np.random.default_rng(0)
    return [level + 0.02 * rng.standard_normal() for level in levels]


def test_a_spike_is_told_once_and_the_next_one_again(caplog: pytest.LogCaptureFixture) -> None:
    losses = noisy([2.5] * 100 + [6.0, 5.0, 3.0] + [2.5] * 50 + [4.0] + [2.5] * 10)
    assert warned(losses, caplog) == [100, 153]


def test_noise_and_a_falling_loss_are_no_spikes(caplog: pytest.LogCaptureFixture) -> None:
    falling = [3 + 8 * math.exp(-step / 200) for step in range(5000)]
    assert warned(noisy(falling), caplog) == []


def test_the_first_fifty_losses_are_no_ground_to_judge_on(caplog: pytest.LogCaptureFixture) -> None:
    assert warned(noisy([2.5] * 49 + [9.0] + [2.5] * 5), caplog) == []


def test_six_standard_deviations_are_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    level = [1.0, 3.0] * 50  # mean 2; the deviation of a sample of 100 is sqrt(100 / 99)
    limit = 2 + 6 * math.sqrt(100 / 99)
    assert warned([*level, limit - 1e-6], caplog) == []
    assert warned([*level, limit + 1e-6], caplog) == [100]
