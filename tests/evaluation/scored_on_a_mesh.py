"""Scores and texts on meshes of eight devices; `test_scoring.py` runs this in a process of its own,
since the number of devices is fixed when JAX starts.

    python scored_on_a_mesh.py GIVEN

GIVEN: a pickle of parameters, config, requests and prompts. Prints one JSON object:
mesh → [scores, texts, how many programs were compiled for other weights].
"""

import contextlib
import json
import logging
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from pythia_jax import sharding
from pythia_jax.bridge.model import Model
from pythia_jax.configs import MeshConfig
from pythia_jax.evaluation.scoring import Scorer

MESHES = ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2})


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Grows by what JAX says of each program that it compiles meanwhile."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    handler.addFilter(lambda record: "Compiling" in record.getMessage())
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield said
    finally:
        logger.removeHandler(handler)


def main() -> None:
    params, config, requests, prompts = pickle.loads(Path(sys.argv[1]).read_bytes())
    report = {}
    for axes in MESHES:
        with jax.set_mesh(sharding.make_mesh(MeshConfig(**axes))):
            scorer = Scorer(Model(params, config, {}))
            scores, texts = scorer.loglikelihoods(requests), scorer.greedy(prompts, 12)
            other = jax.tree.map(lambda x: 2 * x, scorer.params)
            with compilations() as compiled:
                replaced = scorer.replace(other)
                replaced.loglikelihoods(requests)
                replaced.greedy(prompts, 12)
        name = ", ".join(f"{axis} {size}" for axis, size in axes.items() if size > 1)
        report[name] = [scores, texts, len(compiled)]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
