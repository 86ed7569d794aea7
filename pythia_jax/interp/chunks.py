"""Rows of an index computed together: one compiled program, on one device or cut over a mesh."""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import NDArray

from pythia_jax import sharding
from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.data import Batches
from pythia_jax.interp.collecting import LINEAR, collect
from pythia_jax.interp.index import described
from pythia_jax.interp.projection import Projection, matrices, module_name
from pythia_jax.model.gptneox import check_tokens
from pythia_jax.model.parameters import Params
from pythia_jax.model.sinks import Units

Part = tuple[int, NDArray[Any]]
"""A row's number, and values of it and of those that follow."""
_FAULTS = {
    1: "is no finite number: look at its tokens' losses, and at the weights",
    2: "is too large for {} (its float32 is finite): store float32 or bfloat16 (--precision)",
    3: "is all zeros in {}, though not in float32: store float32 or bfloat16 (--precision)",
}


def kernel_gradient(inputs: jax.Array, cotangents: jax.Array, sides: Any) -> jax.Array:
    """A statistic for `collect`: G of each row, `[batch, out, in]`, or P_L G P_Rᵀ, `[batch, p, p]`.

    sides: `left [out, p]` and `right [in, p]`; None for no projection.
    """
    if sides is None:
        return Units().products(cotangents, inputs)
    return Units().projections(inputs, cotangents, sides)


@partial(jax.jit, static_argnames=("config", "runtime"))
def row_gradients(
    params: Params,
    sides: dict[str, Any] | None,
    tokens: Int[Array, "batch seq+1"],
    weights: Float[Array, "batch seq"],
    *,
    config: ModelConfig,
    runtime: Runtime,
) -> Float[Array, "batch numbers"]:
    """Rows of an index: gradients of Σ weights x cross-entropy by row, in an index's order."""
    return _in_rows(_by_module(params, sides, tokens, weights, config, runtime))


def _by_module(
    params: Params,
    sides: dict[str, Any] | None,
    tokens: jax.Array,
    weights: jax.Array,
    config: ModelConfig,
    runtime: Runtime,
) -> list[jax.Array]:
    """The gradients of each linear module, `[layers, batch, numbers]`, in the order of `LINEAR`."""
    found = collect(
        params, tokens, config, kernel_gradient, aux=sides, loss_weights=weights, runtime=runtime
    )
    return [found[module].reshape(*found[module].shape[:2], -1) for module in LINEAR]


def _in_rows(blocks: list[jax.Array]) -> jax.Array:
    """One after another, layer by layer: `[batch, numbers]`."""
    return jnp.concatenate(blocks, axis=2).swapaxes(0, 1).reshape(blocks[0].shape[1], -1)


def projection_sides(projection: Projection | None, config: ModelConfig) -> dict[str, Any] | None:
    """The matrices of the linear modules on the devices, whole on each."""
    if projection is None:
        return None
    every = matrices(projection, config)
    mesh = jax.sharding.get_mesh()
    place = None if mesh.empty else jax.sharding.NamedSharding(mesh, jax.P())
    return jax.device_put({module: every[module] for module in LINEAR}, place)


def _stored(
    params: Params,
    sides: dict[str, Any] | None,
    tokens: jax.Array,
    starts: jax.Array,
    stops: jax.Array,
    *,
    config: ModelConfig,
    dtype: Any,
    runtime: Runtime,
) -> tuple[jax.Array, jax.Array]:
    """Gradients as they are stored, `[batch, numbers]`, and the `_FAULTS` of each row's modules.

    Of the modules, `[batch, layers x modules]` in an index's order; 0 where nothing is wrong.
    """
    targets = jnp.arange(1, tokens.shape[1])
    weights = (starts[:, None] <= targets) & (targets < stops[:, None])
    blocks = _by_module(params, sides, tokens, weights, config, runtime)
    kept = [block.astype(dtype) for block in blocks]
    faults = [
        jnp.select(
            (
                ~jnp.isfinite(wide).all(axis=2),
                ~jnp.isfinite(stored).all(axis=2),
                (wide != 0).any(axis=2) & ~(stored != 0).any(axis=2),
            ),
            [1, 2, 3],
            0,
        )
        for wide, stored in zip(blocks, kept, strict=True)
    ]
    return _in_rows(kept), _in_rows([fault[..., None].astype(jnp.int8) for fault in faults])


@lru_cache
def _program(out_shardings: Any) -> Any:
    """`_stored`, jitted once, so that another index of the same shapes compiles nothing.

    out_shardings: None for the compiler's choice.
    """
    # None would be taken for a tree without leaves.
    how: dict[str, Any] = {} if out_shardings is None else {"out_shardings": out_shardings}
    return jax.jit(_stored, static_argnames=("config", "dtype", "runtime"), **how)


@dataclass(frozen=True)
class Computed:
    """A chunk on the devices, on its way to be written."""

    number: int
    stored: jax.Array
    fault: jax.Array


class Chunks:
    """The rows of an index, `batch` at a time.

    rows: `ROW` of all of them. The last chunk is filled up with rows that weigh nothing. A process
    reads the tokens of those rows alone that its devices hold.
    """

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        served: Batches,
        rows: NDArray[Any],
        *,
        length: int,
        batch: int,
        projection: Projection | None,
        dtype: np.dtype,
        runtime: Runtime,
    ) -> None:
        self.batch, self.rows, self.dtype = batch, rows, dtype
        self._params, self._config, self._served = params, config, served
        self._length = length
        self._sides = projection_sides(projection, config)
        mesh = jax.sharding.get_mesh()
        self._places = self._out = None
        if not mesh.empty:
            across, along = (
                sharding.sharding(mesh, axes) for axes in (("batch", "seq"), ("batch",))
            )
            self._places, self._out = (across, along, along), (across, along)
        shapes = [(batch, length), (batch,), (batch,)]
        given = [
            jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
            for shape, place in zip(shapes, self._places or (None,) * 3, strict=True)
        ]
        lowered = _program(self._out).lower(
            params, self._sides, *given, config=config, dtype=dtype, runtime=runtime
        )
        self.compiled = lowered.compile()

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch)

    def read(self, number: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tokens, starts and stops of a chunk, on the devices."""
        chosen = self.rows[number * self.batch : (number + 1) * self.batch]
        held = np.arange(self.batch)
        if self._places is not None:
            parts = self._places[1].addressable_devices_indices_map((self.batch,)).values()
            held = np.unique(np.concatenate([held[part] for part in parts if part is not None]))
        own = held[held < len(chosen)]
        tokens = np.zeros((self.batch, self._length), np.int32)
        tokens[own] = self._tokens(chosen[own])
        bounds = [np.zeros(self.batch, np.int32) for _ in range(2)]
        for bound, field in zip(bounds, ("start", "stop"), strict=True):
            bound[: len(chosen)] = chosen[field]
        arrays = (tokens, *bounds)
        if self._places is None:
            return tuple(map(jnp.asarray, arrays))  # type: ignore[return-value]
        return tuple(  # type: ignore[return-value]
            jax.make_array_from_callback(array.shape, place, array.__getitem__)
            for array, place in zip(arrays, self._places, strict=True)
        )

    def compute(self, number: int, given: tuple[jax.Array, jax.Array, jax.Array]) -> Computed:
        """Begin to compute a chunk; this does not wait for the devices."""
        return Computed(number, *self.compiled(self._params, self._sides, *given))

    def fetch(self, computed: Computed) -> list[Part]:
        """The rows of a chunk that this process holds, waited for.

        Raises ValueError, naming the row and the module, for a gradient that cannot be stored.
        """
        first = computed.number * self.batch
        for at, faults in _own_parts(computed.fault):
            for i in np.flatnonzero(faults.any(axis=1)):
                row = first + at + int(i)
                if row < len(self.rows):
                    raise ValueError(self._told(row, faults[i]))
        parts = ((first + at, values) for at, values in _own_parts(computed.stored))
        cut = [(row, values[: len(self.rows) - row]) for row, values in parts]
        return [(row, values) for row, values in cut if len(values)]

    def _told(self, row: int, faults: NDArray[np.int8]) -> str:
        """The gravest of a row's faults, and where it is."""
        gravest = faults[faults > 0].min()
        layer, module = divmod(int(np.argmax(faults == gravest)), len(LINEAR))
        name, others = module_name(LINEAR[module], layer), (faults == gravest).sum() - 1
        told = _FAULTS[int(gravest)].format(self.dtype.name)
        where = f"{name} and {others} more" if others else name
        return f"the gradient of {described(self.rows[row])}, in {where}, {told}"

    def _tokens(self, chosen: NDArray[Any]) -> NDArray[np.int32]:
        """The sequences of rows, `[n, seq + 1]`; one that several rows are of is read once."""
        keys = chosen[["step", "slot"]].astype([("step", "<i4"), ("slot", "<i4")])
        unique, places = np.unique(keys, return_inverse=True)
        found = np.empty((len(unique), self._length), np.int32)
        for step in np.unique(unique["step"]):
            of_step = unique["step"] == step
            found[of_step] = self._served.read(int(step), unique["slot"][of_step].astype(np.int64))
        check_tokens(found, self._config)
        return found[places]


def _own_parts(array: jax.Array) -> list[Part]:
    """This process's share of an array cut by rows, each row once."""
    return [
        (shard.index[0].indices(array.shape[0])[0], np.asarray(shard.data))
        for shard in array.addressable_shards
        if shard.replica_id == 0
    ]
