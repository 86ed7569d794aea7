"""For the tests of runs: what `make_config` is, and bits compared."""

from collections.abc import Callable

import jax
import numpy as np

from pythia_jax.configs import RunConfig

Make = Callable[..., RunConfig]


def assert_same_bits(a: object, b: object) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
