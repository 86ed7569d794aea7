"""Several processes that must decide alike: each brings what it sees, all go by one answer.

A process that alone finds a file damaged, or sees an older listing of a shared folder, must not go
another way than the others: they would wait for each other for ever. With one process these
functions return what they are given.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding


def all_say(yes: bool) -> bool:
    """Whether every process says yes. All processes call it, in the same order."""
    if jax.process_count() == 1:
        return yes
    return bool((_gathered([int(yes)]) == 1).all())


def from_first(values: Sequence[int]) -> list[int]:
    """The list of process 0, of any length. All processes call it, in the same order."""
    if jax.process_count() == 1:
        return list(values)
    count = int(_gathered([len(values)])[0, 0])
    padded = [*values, *[0] * count][:count]
    return [int(value) for value in _gathered(padded)[0]]


def _gathered(values: Sequence[int]) -> np.ndarray:
    """`[process, len(values)]` int32: what each process brought, as many values each."""
    firsts = {}  # one device a process speaks for it
    for device in jax.devices():
        firsts.setdefault(device.process_index, device)
    mesh = Mesh(np.array([firsts[process] for process in sorted(firsts)]), ("process",))
    mine = np.asarray(values, np.int32)[None]
    shape = (jax.process_count(), len(values))
    brought = jax.make_array_from_process_local_data(
        NamedSharding(mesh, jax.P("process")), mine, shape
    )
    # Whatever mesh is around us: it may have more devices than speak here.
    with jax.set_mesh(mesh):
        everywhere = jax.jit(jnp.copy, out_shardings=NamedSharding(mesh, jax.P()))(brought)
    return np.asarray(everywhere.addressable_data(0))
