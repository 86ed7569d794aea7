"""Per-example gradients on eight devices beside those on one; `test_gradients.py` runs this in a
process of its own, since the number of devices is fixed when JAX starts.

Its argument says of which cases: `float64` or `others`. Prints one JSON object: case → [largest
relative L2 distance of a parameter's gradients; whether they come out cut by rows].
"""

import functools
import json
import sys

import jax
import numpy as np
from random_inputs import distance, random_params, random_tokens

from pythia_jax import sharding
from pythia_jax.configs import MeshConfig, ModelConfig, Runtime
from pythia_jax.interp import gradient_norms, per_example_gradients
from pythia_jax.interp.projection import Projection
from pythia_jax.model import parameters

CONFIG = ModelConfig(32, 2, 4, vocab_size=64, max_position_embeddings=32)
TOKENS = random_tokens(CONFIG, 8, 11)
DOCUMENTS = np.sort(np.random.default_rng(0).integers(-1, 2, TOKENS.shape), axis=1)
EVERY = {"projection": Projection(4), "parameters": ["layers/*", "embed_*"]}
FLOAT64 = {"rows, float64": (per_example_gradients, {})}
OTHERS = {
    "rows": (per_example_gradients, {}),
    "norms of documents by loss": (
        gradient_norms,
        {"unit": "document", "documents": DOCUMENTS},
    ),
    "documents by position, projected": (
        per_example_gradients,
        {"unit": "document", "documents": DOCUMENTS, "by": "position", **EVERY},
    ),
    "tokens by position, projected": (
        per_example_gradients,
        {"unit": "token", "by": "position", **EVERY},
    ),
}


def compared(function, how, dtype):
    runtime = Runtime(remat="full", loss_chunk=16)
    run = functools.partial(function, config=CONFIG, runtime=runtime, **how)
    params = random_params(CONFIG, dtype=dtype)
    alone = run(params, TOKENS)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, parameters.shardings(mesh))
        rows = jax.device_put(TOKENS, sharding.sharding(mesh, ("batch", "seq")))
        together = run(placed, rows)
    pairs = list(zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True))
    furthest = max(distance(a, b) for a, b in pairs)
    return furthest, all(a.sharding.shard_shape(a.shape)[0] == 2 for a, _ in pairs)


def main():
    report = {}
    for name, (function, how) in {"float64": FLOAT64, "others": OTHERS}[sys.argv[1]].items():
        wide = "float64" in name
        with jax.enable_x64(wide):
            report[name] = compared(function, how, np.float64 if wide else np.float32)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
