"""The compiled sharded step: what it moves, and how often."""

import functools

import pytest

from pythia_jax import configs, sharding
from pythia_jax.training.collectives import Collective, collectives
from pythia_jax.training.plan import compile_step
from pythia_jax.training.step import abstract_state
from pythia_jax.training.trainer import on_devices

HIDDEN, VOCAB, LAYERS = 32, 2048, 3  # More than any activation has, even cut by `tensor`.


@functools.cache
def compiled(data: int, fsdp: int, tensor: int, accumulation: int) -> list[Collective]:
    config = configs.from_dict(
        {
            "model": {
                "hidden_size": HIDDEN,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 4,
                "vocab_size": VOCAB,
                "max_position_embeddings": 64,
            },
            "data": {"sequence_length": 64},
            "training": {
                "batch_size": 32,
                "gradient_accumulation": accumulation,
                "precision": "float32",
            },
            "mesh": {"data": data, "fsdp": fsdp, "tensor": tensor},
        }
    )
    mesh = sharding.make_mesh(config.mesh)
    config = on_devices(config, mesh)
    return collectives(compile_step(config, mesh, abstract_state(config, mesh)).as_text())


@pytest.mark.parametrize(
    ("mesh", "accumulation"), [((1, 8, 1), 1), ((2, 2, 2), 1), ((2, 2, 2), 2)], ids=str
)
def test_the_unembedding_is_moved_once_a_microbatch(
    mesh: tuple[int, int, int], accumulation: int
) -> None:
    found = compiled(*mesh, accumulation)
    size = HIDDEN * VOCAB // mesh[2]
    large = [c for c in found if c.elements >= size]
    own = () if accumulation == 1 else (accumulation,)  # accumulation's loop is around everything
    assert {c.loops for c in large} <= {(), own}

    of_loss = [c for c in large if "shard_map" in c.op_name]
    gathers = [c for c in of_loss if c.kind == "all-gather"]
    reductions = [c for c in of_loss if c.kind == "reduce-scatter"]
    assert len(gathers) == len(reductions) == 1
    assert gathers[0].times in (1, accumulation)  # the compiler may see that it is always the same
    assert reductions[0].times == accumulation


def test_each_layer_gathers_its_parameters_in_the_loop_over_layers() -> None:
    found = compiled(1, 8, 1, 1)
    inside = [c for c in found if c.kind == "all-gather" and c.loops == (LAYERS,)]
    # Four kernels are gathered on the way forward, and again on the way back.
    kernels = {3 * HIDDEN * HIDDEN, HIDDEN * HIDDEN, 4 * HIDDEN * HIDDEN}
    assert kernels <= {c.elements for c in inside}
    assert all(c.times == LAYERS for c in inside)
