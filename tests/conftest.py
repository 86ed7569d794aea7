"""Shared by all tests: `reference` is importable from anywhere, and nothing reaches a hub."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The TPU compiler that plans are tested with looks for TPUs otherwise, and complains.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent))
# Libraries that are first imported inside a command under test keep a handler for its output, which
# is closed after it, and logging prints a traceback for each message. (A message of ours with wrong
# arguments still fails its test: pytest's own handler raises.)
logging.raiseExceptions = False

HURRIED = ("interp", "model", "training/test_eight_devices.py", "training/test_processes.py")
"""Tests whose programs are many and small, and are compiled for longer than they run."""


@pytest.fixture(scope="module", autouse=True)
def compiled_in_a_hurry(request: pytest.FixtureRequest) -> Iterator[None]:
    """For `HURRIED`, and what they start: machine code that LLVM did not optimise.

    With the slow tests (`make test-all`) everything is compiled as in use.
    """
    here = Path(__file__).parent
    named = {here / name for name in HURRIED} & {request.path, *request.path.parents}
    if not named or request.config.option.markexpr != "not slow":
        yield
        return
    import jax  # Not all tests want it.

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        before = jax.config.read("jax_disable_most_optimizations")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", before)
