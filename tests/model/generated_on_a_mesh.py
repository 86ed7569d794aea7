"""Generation on eight devices beside the same on one; `test_generation.py` runs this in a process
of its own, since the number of devices is fixed when JAX starts.

Prints one JSON object: the rows of either, and the part of the cache that a device has.
"""

import json
from dataclasses import dataclass
from typing import Any

import jax
from on_a_mesh import placed
from random_inputs import random_params

import pythia_jax as pj
from pythia_jax import sharding
from pythia_jax.configs import MeshConfig, ModelConfig
from pythia_jax.model import slots

CONFIG = ModelConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=128,
    max_position_embeddings=64,
)
PROMPTS = [[5, 6, 7], [9], list(range(20, 33)), [3] * 8, [1, 2]]


@dataclass
class Bare:
    params: Any
    config: ModelConfig = CONFIG
    tokenizer: Any = None
    eod: int = 0


def rows(params: Any) -> list:
    model = Bare(params)
    settings: dict[str, Any] = {
        "temperature": 0.7,
        "top_k": 30,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "cache_dtype": "int8",
    }
    return pj.generate(model, PROMPTS, max_new_tokens=9, batch_size=3, **settings)


def main() -> None:
    params = random_params(CONFIG)
    params["embed_out"]["kernel"] = params["embed_out"]["kernel"] * 5
    report: dict[str, Any] = {"one": rows(params)}
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=1, tensor=4))
    with jax.set_mesh(mesh):
        report["eight"] = rows(placed(params))
        state = slots.empty(CONFIG, 4, 32, "float32", penalised=False)
        keys = state.caches[0][0].values
        report["cache"] = keys.addressable_shards[0].data.shape
    print(json.dumps(report))


if __name__ == "__main__":
    main()
