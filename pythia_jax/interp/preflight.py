"""What a large piece of work will take, before it is begun: disk, memory, time.

Bytes on disk are exact; memory is what the compiler planned, held against what is free; time is
that of a first piece. What cannot fit is refused with the numbers.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

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
    wanted = stats.temp_size_in_bytes + outputs * stats.output_size_in_bytes
    wanted += stats.generated_code_size_in_bytes
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return Memory(wanted, (free := host_memory()) and free // len(devices))
    return Memory(wanted, min(filter(None, map(_free, devices)), default=None))


def refusal(memory: Memory, what: str) -> MemoryError:
    """What to say of a program that does not fit."""
    assert memory.free is not None
    return MemoryError(
        f"{what} takes {in_bytes(memory.wanted)} of memory on each device beside the weights, and "
        f"{in_bytes(memory.free)} are free"
    )


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


def _free(device: Any) -> int | None:
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
