"""One of several processes that go on with a run and save three steps of it.

    python saving_process.py CONFIG ADDRESS PROCESSES NUMBER

Prints the step it went on from.
"""

import sys

import jax
from checkpoint_runs import like, random_state

from pythia_jax import configs, sharding
from pythia_jax.training.checkpoints import Checkpoints


def main() -> None:
    path, address, processes, number = sys.argv[1:]
    jax.distributed.initialize(address, int(processes), int(number), heartbeat_timeout_seconds=10)
    config = configs.load(path)
    shape, mesh = like(config, jax.devices()), sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh), Checkpoints(config, shape) as run:
        found = run.restore_newest()
        print(found and found[0])
        if found is not None:
            state = random_state(shape, found[0])
            same = jax.jit(lambda a, b: [same_bits(x, y) for x, y in pairs(a, b)])
            assert all(map(bool, same(found[1], state))), "other bits than were saved"
        first = 0 if found is None else found[0] + 1
        for step in range(first, first + 3):
            run.check()
            run.save(step, random_state(shape, step), resume=True)


def pairs(a: object, b: object) -> list[tuple[jax.Array, jax.Array]]:
    return list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def same_bits(x: jax.Array, y: jax.Array) -> jax.Array:
    words = [z if z.dtype == bool else jax.lax.bitcast_convert_type(z, "uint32") for z in (x, y)]
    return (words[0] == words[1]).all()


if __name__ == "__main__":
    main()
