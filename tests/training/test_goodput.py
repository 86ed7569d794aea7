"""The clock of an attempt: made-up times, goodput worked out by hand."""

import pytest

from pythia_jax.training.goodput import Clock


def test_steps_that_follow_each_other_count_from_one_end_to_the_next() -> None:
    clock = Clock(began=100.0)
    # Dispatched at 140 after compiling; the loop then runs ahead of the device.
    came = clock.batch_came(140.0, data_wait=1.0)
    clock.loop_free(140.1)
    assert clock.step_done(came, 150.0, redone=False) == 10.0
    came = clock.batch_came(141.0, data_wait=0.5)
    assert came == pytest.approx(140.6)
    assert clock.step_done(came, 160.0, redone=False) == 10.0
    assert clock.goodput(160.0) == pytest.approx(20 / 60)
    assert clock.goodput(200.0) == pytest.approx(20 / 100)


def test_a_wait_counts_as_lost_only_beyond_what_the_device_still_had_to_do() -> None:
    clock = Clock(began=0.0)
    clock.step_done(clock.batch_came(0.0, 0.0), 10.0, redone=False)
    clock.loop_free(1.0)
    # The batch comes at 13, three seconds after the device had nothing left.
    came = clock.batch_came(13.1, data_wait=12.0)
    assert clock.step_done(came, 23.0, redone=False) == 10.0
    assert clock.goodput(23.0) == pytest.approx(20 / 23)


def test_saving_and_evaluating_are_lost() -> None:
    clock = Clock(began=0.0)
    clock.step_done(clock.batch_came(0.0, 0.0), 10.0, redone=False)
    clock.loop_free(30.0)  # saved until 30
    came = clock.batch_came(31.0, data_wait=0.0)
    assert clock.step_done(came, 40.0, redone=False) == 10.0
    assert clock.goodput(40.0) == pytest.approx(20 / 40)


def test_a_step_done_again_takes_time_and_is_no_good() -> None:
    clock = Clock(began=0.0)
    assert clock.step_done(clock.batch_came(0.0, 0.0), 10.0, redone=True) == 10.0
    clock.loop_free(0.0)
    assert clock.goodput(10.0) == 0.0
    clock.step_done(clock.batch_came(1.0, 0.0), 20.0, redone=False)
    assert clock.goodput(20.0) == 0.5
