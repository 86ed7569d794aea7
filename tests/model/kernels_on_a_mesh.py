"""Each kernel on eight devices beside the same on one; `test_attention.py` runs this in a process
of its own, since the number of devices is fixed when JAX starts.

Prints one JSON object: kernel → [relative L2 distance of z, gradients and, where there are any,
second derivatives; the collectives in its program].
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from random_inputs import distance

from pythia_jax import sharding
from pythia_jax.configs import MeshConfig
from pythia_jax.model import attention, kernels

COLLECTIVE = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def attend(kernel):
    return lambda q, k, v: attention.attend(q, k, v, kernel, lambda site, value: value)


def on_own_shard(kernel, **check):
    axes = (attention.HEADS,) * 3
    return lambda q, k, v: sharding.by_shard(kernel, axes, attention.HEADS, **check)(q, k, v)


TWICE = {"xla": attend("xla"), "einsum": attend("einsum")}
ONCE = {
    "xla on a tpu": on_own_shard(
        functools.partial(attention._blockwise_attention, platform="tpu"),
    ),
    "splash": on_own_shard(functools.partial(kernels.splash, interpret=True), check_vma=False),
}


def derivatives(kernel, second, q, k, v, direction):
    """z, its gradients along `direction` and, if `second`, their derivative along `direction`."""

    def gradients(q, k, v):
        z, pullback = jax.vjp(kernel, q, k, v)
        return z, *pullback(direction)

    if not second:
        return gradients(q, k, v)
    return jax.jvp(gradients, (q, k, v), (direction, direction, direction))


def main():
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((8, 130, 2, 8)).astype(np.float32) for _ in range(4)]
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    cut = sharding.sharding(mesh, attention.HEADS)
    report = {}
    for name, kernel in {**TWICE, **ONCE}.items():
        run = functools.partial(derivatives, kernel, name in TWICE)
        alone = jax.jit(run)(*arrays)
        with jax.set_mesh(mesh):
            parts = [jax.device_put(x, cut) for x in arrays]
            compiled = jax.jit(run).lower(*parts).compile()
            together = compiled(*parts)
        pairs = zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True)
        furthest = max(float(distance(np.asarray(a), jnp.asarray(b))) for a, b in pairs)
        sent = sorted(set(re.findall(rf"\b({COLLECTIVE})\(", str(compiled.as_text()))))
        report[name] = [furthest, sent]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
