"""Shards from a file and a file from shards, for tools that want the other; we read either.

Source: GPT-NeoX's tools, shard_memmap and unshard_memmap of EleutherAI/pythia utils.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pythia_jax.data.indexed import index_location
from pythia_jax.data.storage import (
    Bytes,
    PathLike,
    find_tokens,
    is_url,
    open_bytes,
    shard_name,
    strip_suffix,
)

SHARD_BYTES = 5_000_000_000  # of the published Pile
_CHUNK = 16 << 20  # bytes held in memory

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and those to write."""


def shard(
    prefix: PathLike,
    out: PathLike,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> list[Path]:
    """Writes the tokens of a dataset as shards `OUT-00000-of-000NN.bin`, and copies its `.idx`.

    floor(size / shard_bytes) + 1 of them, as upstream: where the division leaves no rest, the last
    one is empty. Nothing has its name before all are whole. Missing folders are made.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: there is no such dataset.
        FileExistsError: there are shards of OUT, or another index, already.
        OSError: the disk has no room for them.
        ValueError: `shard_bytes` is not positive, or OUT is a URL.
    """
    if shard_bytes < 1:
        raise ValueError(f"shards of {shard_bytes} bytes; give at least 1")
    source, out = find_tokens(prefix), _local(out)
    last = source.size // shard_bytes
    if last >= 100_000:
        raise ValueError(f"{source.name}: {last + 1} shards of {shard_bytes} bytes; give more")
    taken = sorted(out.parent.glob(f"{_escaped(out.name)}-[0-9]*-of-[0-9]*.bin"))
    if taken:
        raise FileExistsError(f"{taken[0]}: there already; remove the shards of {out} first")
    targets = []
    for number in range(last + 1):
        start = number * shard_bytes
        stop = min(start + shard_bytes, source.size)
        targets.append((Path(shard_name(out, number, last)), source, start, stop))
    return _write_all([*targets, *_index_copy(prefix, out)], progress)


def unshard(prefix: PathLike, out: PathLike, progress: Progress | None = None) -> list[Path]:
    """Writes the tokens of a dataset as the one file `OUT.bin`, and copies its `.idx`.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: there is no such dataset, or a shard is missing.
        FileExistsError: there is such a file already.
        OSError: the disk has no room for it.
        ValueError: a shard of the wrong length, or OUT is a URL.
    """
    out = _local(out)
    target = Path(f"{out}.bin")
    if target.exists():
        raise FileExistsError(f"{target}: there already; remove it first, or choose another OUT")
    source = find_tokens(prefix)
    return _write_all([(target, source, 0, source.size), *_index_copy(prefix, out)], progress)


_Target = tuple[Path, Bytes, int, int]  # bytes start to stop of the source make this file


def _local(out: PathLike) -> Path:
    if is_url(out):
        raise ValueError(f"{out}: files are written on this machine; name a path")
    return Path(strip_suffix(out))


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _index_copy(prefix: PathLike, out: Path) -> Iterator[_Target]:
    """The index as a file to write, unless there is none, or it is there already."""
    location, target = index_location(prefix), Path(f"{out}.idx")
    try:
        index = open_bytes(location)
    except FileNotFoundError:
        return  # preshuffled data does without
    if not is_url(location) and target.exists() and target.samefile(location):
        return
    if target.exists():
        raise FileExistsError(f"{target}: there already; remove it first, or choose another OUT")
    yield target, index, 0, index.size


def _write_all(targets: Sequence[_Target], progress: Progress | None) -> list[Path]:
    """Writes files under temporary names, and names them when all are whole."""
    folder = targets[0][0].parent
    total = sum(stop - start for _, _, start, stop in targets)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise OSError(
            f"{folder}: {total / 1e9:.1f} GB to write, but only {free / 1e9:.1f} GB are free"
        )
    partial = {t: t.with_name(f".{t.name}.{os.getpid()}.partial") for t, _, _, _ in targets}
    done = 0
    try:
        for target, source, start, stop in targets:
            with partial[target].open("wb") as file:
                for first in range(start, stop, _CHUNK):
                    last = min(first + _CHUNK, stop)
                    file.write(source.read(first, last).data)
                    done += last - first
                    if progress is not None:
                        progress(done, total)
                file.flush()
                os.fsync(file.fileno())
        for target, path in partial.items():
            path.replace(target)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return list(partial)
