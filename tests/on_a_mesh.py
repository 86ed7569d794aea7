"""Scripts that compute the same on eight devices and on one, each in a process of its own.

The number of devices is fixed when JAX starts, and the other tests want one.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from random_inputs import distance

from pythia_jax import sharding
from pythia_jax.configs import MeshConfig
from pythia_jax.model.parameters import Params, map_parameters


def on_eight_devices(script: Path, *arguments: str | Path, x64: bool = False) -> Any:
    """What `script` prints as its last line, in JSON, of a process that has eight devices."""
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    own = {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, script, *arguments],
        env={**os.environ, **own, "JAX_ENABLE_X64": str(int(x64))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def placed(params: Params) -> Params:
    """Parameters as training lays them on the ambient mesh."""
    mesh = jax.sharding.get_mesh()
    return map_parameters(
        lambda parameter, value: jax.device_put(value, sharding.sharding(mesh, parameter.axes)),
        params,
    )


def print_distances(results: Callable[[], Mapping[str, Any]]) -> None:
    """Print result → norm of the difference between eight devices and one, over the norm."""
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        one = results()
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        eight = results()

    def flat(tree: Any) -> np.ndarray:
        return np.asarray(ravel_pytree(jax.device_get(tree))[0])

    print(json.dumps({name: distance(flat(eight[name]), flat(one[name])) for name in one}))
