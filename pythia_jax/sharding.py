"""The device mesh, and how the logical axes of arrays lie on it.

The mesh has four axes. Rows of a batch are cut over the first three; parameters over `fsdp` and
`tensor`, each device holding a part that is gathered where it is used. Whoever describes an array
names logical axes alone; `RULES` says where they lie. Code that runs with no mesh around it, or
with a mesh of one device, is plain code.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pythia_jax.configs import ConfigError, MeshConfig, ModelConfig

AXES = ("slices", "data", "fsdp", "tensor")
"""Axes of the mesh, the slowest network first."""
ROWS = ("slices", "data", "fsdp")
"""Axes that the rows of a batch are cut over."""

RULES: dict[str, tuple[str, ...]] = {
    "batch": ROWS,
    # Of parameters.
    "layers": (),
    "hidden": ("fsdp",),
    "vocab": ("tensor",),
    "qkv": ("tensor",),
    # Of parameters and of activations.
    "heads": ("tensor",),
    "mlp": ("tensor",),
    # Of activations: `stream` is the width of the residual stream.
    "seq": (),
    "stream": (),
    "head": (),
}
"""Mesh axes of each logical axis."""

Axes = Sequence[str]


def spec(axes: Axes) -> PartitionSpec:
    """Where an array of these logical axes lies.

    Raises ValueError if two of its axes would lie on one axis of the mesh.
    """
    places = [RULES[axis] for axis in axes]
    used = [mesh_axis for place in places for mesh_axis in place]
    twice = {mesh_axis for mesh_axis in used if used.count(mesh_axis) > 1}
    if twice:
        raise ValueError(f"axes {tuple(axes)} lie on {', '.join(sorted(twice))} of the mesh twice")
    return PartitionSpec(*(place or None for place in places))


def sharding(mesh: Mesh, axes: Axes) -> NamedSharding:
    return NamedSharding(mesh, spec(axes))


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, int, int, int]:
    """Sizes of `AXES`, the open one filled in. Raises ConfigError if they do not fit."""
    sizes = [getattr(config, axis) for axis in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    asked = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    have = f"mesh: {asked} does not fit {devices} device{'s' * (devices != 1)}: "
    if devices % fixed:
        raise ConfigError(f"{have}{fixed} does not divide {devices}; choose sizes that do")
    if fixed != devices and -1 not in sizes:
        raise ConfigError(f"{have}they make {fixed}; set one to -1, which takes what is left")
    slices, data, fsdp, tensor = (devices // fixed if size == -1 else size for size in sizes)
    return slices, data, fsdp, tensor


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a config over `devices` (all there are, by default), its axes left to XLA.

    Axes that talk most lie on neighbouring devices. Raises ConfigError if it does not fit.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    present = {getattr(device, "slice_index", 0) for device in devices}
    # GPUs count each host as a slice; there, only a mesh that says so is laid out by slices.
    if len(present) > 1 and devices[0].platform == "tpu" and shape[0] != len(present):
        raise ConfigError(
            f"mesh.slices: {shape[0]} does not fit: the devices are {len(present)} slices; set it "
            f"to {len(present)}"
        )
    if 1 < len(present) == shape[0]:
        across, within = (shape[0], 1, 1, 1), (1, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            within, across, devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_fit(mesh: Mesh | AbstractMesh, model: ModelConfig, microbatch: int) -> None:
    """Refuse a mesh that cannot cut this model, or `microbatch` rows, into equal parts.

    Raises ConfigError with the numbers.
    """
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    rows = parts_of_rows(mesh)
    wants = (
        ("tensor", tensor, "model.num_attention_heads", model.num_attention_heads),
        ("tensor", tensor, "model.intermediate_size", model.intermediate_size),
        ("tensor", tensor, "model.vocab_size", model.vocab_size),
        ("fsdp", fsdp, "model.hidden_size", model.hidden_size),
        (" x ".join(ROWS), rows, "rows of a microbatch (batch_size / accumulation)", microbatch),
    )
    for name, parts, key, size in wants:
        if size % parts:
            raise ConfigError(
                f"mesh: {name} = {parts} does not divide {key} = {size}; choose a size that does"
            )


def current() -> AbstractMesh | None:
    """The mesh around us (`jax.set_mesh`); None if there is none, or it is of one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def parts_of_rows(mesh: Mesh | AbstractMesh | None = None) -> int:
    """How many parts a mesh, or that around us, cuts the rows of a batch into."""
    mesh = current() if mesh is None else mesh
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


def place_rows(array: np.ndarray) -> jax.Array:
    """Rows on the mesh around us, if there is one: `[batch]` or `[batch, seq]`, the same array in
    every process."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jnp.asarray(array)
    place = sharding(mesh, ("batch", "seq")[: array.ndim])
    return jax.make_array_from_callback(array.shape, place, array.__getitem__)


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    """`x`, made to lie as its logical axes say."""
    return x if current() is None else jax.lax.with_sharding_constraint(x, spec(axes))


def by_shard(
    f: Callable[..., Any],
    in_axes: Any,
    out_axes: Any,
    *,
    manual: Sequence[str] = AXES,
    check_vma: bool = True,
) -> Callable[..., Any]:
    """`f` on each device's own part of its arguments; `f` itself where there is no mesh.

    in_axes, out_axes: trees of logical axes, a tuple of names an array. manual: the mesh axes that
    `f` sees cut; along the others the compiler cuts as it likes. Collectives inside `f` name mesh
    axes.
    """
    if current() is None:
        return f

    def cut(axes: Axes) -> PartitionSpec:
        kept = [tuple(a for a in RULES[axis] if a in manual) or None for axis in axes]
        return PartitionSpec(*kept)

    def specs(tree: Any) -> Any:
        return jax.tree.map(cut, tree, is_leaf=_is_axes)

    return jax.shard_map(
        f,
        in_specs=specs(in_axes),
        out_specs=specs(out_axes),
        axis_names=set(manual),
        check_vma=check_vma,
    )


def _is_axes(tree: Any) -> bool:
    return isinstance(tree, tuple) and all(isinstance(axis, str) for axis in tree)
