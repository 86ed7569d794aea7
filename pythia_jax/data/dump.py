"""Batches written out as one `.npy` file, for whoever wants to look at them without us."""

import hashlib
import os
from pathlib import Path

import numpy as np

from pythia_jax.data.batches import Batches


def dump(batches: Batches, start: int, stop: int, out: str | os.PathLike[str]) -> str:
    """Writes the rows of steps `start` to `stop` (not included), `[rows, seq + 1]` int32.

    The file appears under its name when it is whole; if anything fails, nothing is left of it and
    a file that was there before stays.

    Returns:
        The SHA-256 of the rows as little-endian int32, in hexadecimal.

    Raises:
        ValueError: the split has no such steps.
    """
    if not 0 <= start < stop <= len(batches):
        raise ValueError(
            f"steps {start} to {stop} asked for, but {batches.name} of {batches.source} has steps "
            f"0 to {len(batches)} (the last not included)"
        )
    out = Path(out)
    if out.is_dir():
        raise IsADirectoryError(f"{out}: is a folder; name the .npy file to write")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.parent} to write it in")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    digest = hashlib.sha256()
    try:
        first = batches[start]
        shape = ((stop - start) * len(first), first.shape[1])
        rows = np.lib.format.open_memmap(partial, mode="w+", dtype=np.dtype("<i4"), shape=shape)
        for i, step in enumerate(range(start, stop)):
            batch = np.ascontiguousarray(first if step == start else batches[step], dtype="<i4")
            rows[i * len(batch) : (i + 1) * len(batch)] = batch
            digest.update(batch.data)
        rows.flush()
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return digest.hexdigest()
