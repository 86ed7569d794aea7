"""What a result was computed on: whose weights, with which versions, on which devices."""

from typing import Any

import jax

from pythia_jax import __version__
from pythia_jax.bridge.revisions import weights_hash
from pythia_jax.model.parameters import Params


def computed_on(params: Params, *, source: str, weights: str | None = None) -> dict[str, Any]:
    """What is kept beside a result, for JSON; the same keys beside every kind of result.

    params: as they lay on the devices. source: where they came from, as `Model.source` says.
    weights: their `revisions.weights_hash`, where it is known already; else it is made here.

    Keys: `source`, `weights`; `dtype` of the weights; versions of `pythia_jax` and `jax`;
    `platform`, `device_kind`, how many `devices` and `processes`, and the `mesh`, its axes longer
    than 1.
    """
    array = jax.tree.leaves(params)[0]
    devices = array.sharding.device_set
    device = next(iter(devices))
    mesh = {}
    if isinstance(array.sharding, jax.sharding.NamedSharding):
        mesh = {axis: size for axis, size in array.sharding.mesh.shape.items() if size > 1}
    return {
        "source": source,
        "weights": weights_hash(params) if weights is None else weights,
        "dtype": array.dtype.name,
        "pythia_jax": __version__,
        "jax": jax.__version__,
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": len(devices),
        "processes": len({each.process_index for each in devices}),
        "mesh": mesh,
    }
