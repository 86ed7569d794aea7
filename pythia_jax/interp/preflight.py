"""What a large piece of work will take, before it is begun: disk, memory, time.

Bytes on disk are exact; memory is what the compiler planned and what is kept beside it, held
against what is free; time is that of a first piece. What cannot fit is refused with the numbers.
"""

import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax

log = logging.getLogger(__name__)

T = TypeVar("T")
_GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Memory:
    """Bytes that a compiled program wants beside its arguments, on each device, and has.

    free is None where nothing tells it.
    """

    wanted: int
    free: int | None

    @property
    def fits(self) -> bool:
        return self.free is None or self.wanted <= self.free


def check_disk(place: Path, wanted: int, what: str, *, there: int = 0) -> int:
    """Free bytes where `place` is, or will be.

    wanted: bytes to be written. there: how many of them are on disk already.

    Raises OSError with the numbers if they do not fit.
    """
    folder = place.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if wanted - there > free:
        raise OSError(
            f"{place}: {what} takes {in_bytes(wanted - there)} of disk, and {in_bytes(free)} are "
            "free there; take less, or another disk"
        )
    return free


def memory_of(compiled: Any, *, outputs: int = 1) -> Memory:
    """What a program compiled by `jax.jit(f).lower(…).compile()` wants, its arguments aside.

    outputs: how many results exist at once while it runs.
    """
    stats = compiled.memory_analysis()
    # Results that take the place of an argument want no room of their own.
    result = stats.output_size_in_bytes - stats.alias_size_in_bytes
    wanted = stats.temp_size_in_bytes + outputs * result
    return Memory(wanted + stats.generated_code_size_in_bytes, free_each())


def check_memory(
    what: str,
    *kept: tuple[float, Any],
    program: Callable[[], Any] | None = None,
    advice: str = "cut the model over more devices (mesh.fsdp)",
) -> None:
    """Refuse, with the numbers, work that does not fit beside what is in memory already.

    kept: (how many, tree) of the arrays that it will hold besides; of the tree, shapes, dtypes and
    where it lies matter. program: gives the compiled one that runs meanwhile. `jax.jit` has it
    from `.lower(…).compile()`, and does not compile again when it is called.

    Inside a transformation nothing is known, and nothing is refused.

    Raises MemoryError.
    """
    free = free_each()
    leaves = jax.tree.leaves([tree for _, tree in kept])
    if free is None or any(map(_traced, leaves)):
        return
    wanted = math.ceil(sum(count * share(tree) for count, tree in kept))
    if wanted <= free and program is not None:
        wanted += memory_of(program()).wanted
    if wanted > free:
        raise refusal(Memory(wanted, free), what, advice)


def check_host(wanted: int, what: str) -> None:
    """Refuse, with the numbers, what this machine's memory cannot hold, devices' aside."""
    free = host_memory()
    if free is not None and wanted > free:
        raise MemoryError(
            f"{what}: {in_bytes(wanted)} of memory are wanted, and {in_bytes(free)} are free"
        )


def refusal(memory: Memory, what: str, advice: str = "") -> MemoryError:
    """What to say of a program that does not fit."""
    assert memory.free is not None
    return MemoryError(
        f"{what} takes {in_bytes(memory.wanted)} of memory on each device beside the weights, and "
        f"{in_bytes(memory.free)} are free{advice and '; '}{advice}"
    )


def share(tree: Any) -> int:
    """Bytes of a tree of arrays, or of their shapes, that one device holds."""

    def each(x: Any) -> int:
        place = getattr(x, "sharding", None)
        shape = x.shape if place is None else place.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(map(each, jax.tree.leaves(tree)))


def results(program: Any) -> Any:
    """Shapes and dtypes of what a compiled program gives and, on a mesh, where it will lie."""
    on_mesh = not jax.sharding.get_mesh().empty

    def each(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if on_mesh else None)

    return jax.tree.map(each, program.out_info)


def free_each() -> int | None:
    """Free bytes of memory of each of our devices; None if unknown."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        free = host_memory()
        return free if free is None else free // len(devices)
    known = [free for free in map(_free, devices) if free is not None]
    return min(known, default=None)


def timed(pieces: Iterable[T], count: int, what: str) -> Iterator[T]:
    """The pieces of a piece of work, `count` of them; when two are done, log what the rest takes.

    Two, since the first one compiles.
    """
    began = 0.0
    for number, piece in enumerate(pieces):
        now = time.perf_counter()
        if number == 2:
            log.info("%s: about %s", what, in_time((now - began) * (count - 2)))
        began = now
        yield piece


def host_memory() -> int | None:
    """Free bytes of this machine's memory, or of what our share of it leaves; None if unknown."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(1024 * int(line.split()[1]))
        limit = (_GROUPS / "memory.max").read_text().strip()
        if limit != "max":
            found.append(int(limit) - int((_GROUPS / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # not Linux, or no group of ours
    if not found and "SC_AVPHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(found)) if found else None


def in_bytes(count: float) -> str:
    """`1.5 GB`: decimal units, as disks are sold."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def in_time(seconds: float) -> str:
    """`40 s`, `5 min`, `2.5 h`, `12 days`."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"


def _traced(leaf: Any) -> bool:
    """Whether an array has no value yet."""
    try:
        getattr(leaf, "is_fully_addressable", None)
    except jax.errors.ConcretizationTypeError:
        return True
    return False


def _free(device: Any) -> int | None:
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
