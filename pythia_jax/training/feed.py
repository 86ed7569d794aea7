"""Batches on their way to the devices: each process reads its own rows, ahead of the step."""

import hashlib
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from pythia_jax import sharding
from pythia_jax.data import Batches


class GlobalBatches:
    """`placed[step]`: a batch as one array over the whole mesh, `[batch, seq + 1]`.

    Of its rows this process reads those alone that its devices hold.
    """

    def __init__(self, batches: Batches, mesh: Mesh) -> None:
        self._batches = batches
        self._sharding = sharding.sharding(mesh, ("batch", "seq"))

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, step: int) -> Int[Array, "batch seq+1"]:
        size = self._batches.batch_size
        held = self._sharding.addressable_devices_indices_map((size,))
        everything = np.arange(size)
        rows = np.unique(np.concatenate([everything[index] for index in held.values() if index]))
        tokens = self._batches.read(step, rows)

        def part(index: Any) -> np.ndarray:
            return tokens[np.searchsorted(rows, everything[index[0]])]

        shape = (size, tokens.shape[1])
        return jax.make_array_from_callback(shape, self._sharding, part)

    def digest(self, step: int) -> str:
        """SHA-256 of the whole batch, as `data batches` tells it."""
        return hashlib.sha256(self._batches[step].data).hexdigest()


def read_ahead(
    batches: GlobalBatches, start: int, stop: int, buffer: int = 2
) -> Iterator[Int[Array, "batch seq+1"]]:
    """The batches of steps `start` to `stop`, in order, up to `buffer` of them read ahead.

    A record is a whole batch, gathered by NumPy in one go: row by row, Grain is a hundred times
    slower. The order is the dataset's; there is no iterator state to save.
    """
    if start >= stop:
        return iter(())
    steps = grain.MapDataset.source(batches)[start:stop]  # type: ignore[arg-type]
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=buffer)
    return iter(steps.to_iter_dataset(options))
