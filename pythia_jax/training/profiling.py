"""A few steps under JAX's profiler."""

import logging
from pathlib import Path
from typing import Any

import jax

from pythia_jax.training.pod import is_first

log = logging.getLogger(__name__)


class Profile:
    """Traces `steps` steps from `first_step` on into `folder`, for TensorBoard's profile view.

    A context manager. The first step of an attempt is no good choice: most of it is compilation.
    Each process traces its own devices.
    """

    def __init__(self, folder: Path, first_step: int, steps: int) -> None:
        if steps < 0:
            raise ValueError(f"steps to profile: {steps}; it must be at least 0")
        self._folder = folder
        self._steps = range(first_step, first_step + steps)
        self._traced = 0
        self._mark: jax.profiler.StepTraceAnnotation | None = None

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._stop(None)
        if kind is None and self._traced < len(self._steps) and is_first():
            log.warning(
                "profile: %d of %d steps traced: training ended before there were more, and the "
                "first step of an attempt, which compiles, is left out",
                self._traced,
                len(self._steps),
            )

    def step(self, step: int, state: Any = None) -> None:
        """Called before batch `step` is dispatched; `state` is what the steps before gave.

        The state is waited for where the trace begins and ends, so that it holds whole steps.
        """
        if step not in self._steps:
            self._stop(state)
            return
        if self._mark is None:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
        else:
            self._mark.__exit__(None, None, None)
        self._mark = jax.profiler.StepTraceAnnotation("train", step_num=step)
        self._mark.__enter__()
        self._traced += 1

    def _stop(self, state: Any) -> None:
        if self._mark is None:
            return
        jax.block_until_ready(state)
        self._mark.__exit__(None, None, None)
        self._mark = None
        jax.profiler.stop_trace()
        log.info(
            "profile written to %s; `tensorboard --logdir %s` shows it, with xprof installed",
            self._folder,
            self._folder,
        )
