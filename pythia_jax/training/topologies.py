"""TPU slices that are not here: their names, their sizes, and devices to compile for.

Two ways to name one. The grid of its chips, `v4:2x2x4`, is libtpu's. The accelerator type,
`v4-32` or `v5litepod-16`, is the cloud's: it counts TensorCores on v2 to v5p, of which a chip has
two, and chips on v5e and v6e. Grids, and which of them a type stands for, are those of Google's
Cloud TPU documentation (a page a version); where a size has several grids, the type is the most
cube-like.
"""

import difflib
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pythia_jax.chips import CHIPS, Chip

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
_SOLID = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", *_CUBES)
GRIDS: dict[str, tuple[str, ...]] = {
    "v2": ("2x2", "4x4", "8x8", "8x16", "16x16"),
    "v3": ("2x2", "4x4", "8x8", "8x16", "16x16", "16x32", "32x32"),
    "v4": _SOLID,
    "v5e": _FLAT,
    "v5p": (*_SOLID, "16x16x24"),
    "v6e": _FLAT,
    "tpu7x": _SOLID,
}
"""Grids of chips that the cloud has of each version, smallest first, one a size."""

SENDS: dict[str, float] = {"v4": 300e9, "v5e": 200e9, "v5p": 600e9, "v6e": 400e9}
"""Bytes a second that a chip sends to its neighbours, over all links: half of the documentation's
figure for both directions."""

ENVIRONMENT = {
    # This process opens no TPU, even where there is one.
    "JAX_PLATFORMS": "cpu",
    # What it compiles would be kept and could not be read back.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    # libtpu neither asks the cloud which TPU it is on, nor complains that there is none,
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # and lets others use it at the same time.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""What has to stand in the environment before JAX is imported, for a process that only compiles."""


class TopologyError(ValueError):
    """A TPU slice that there is not, or no compiler for it."""


@dataclass(frozen=True)
class Topology:
    """`slices` equal slices of TPU chips. grid: chips along each dimension of one."""

    chip: Chip
    grid: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As libtpu calls one slice: `v4:2x2x4`."""
        return f"{self.chip.topology}:{'x'.join(map(str, self.grid))}"

    @property
    def accelerator(self) -> str | None:
        """As the cloud calls one slice: `v4-32`; None where it has no such name."""
        version = str(self.chip.topology)
        if version == "tpu7x" or "x".join(map(str, self.grid)) not in GRIDS[version]:
            return None
        return f"{self.chip.cloud}-{math.prod(self.grid) * self.chip.cores_per_chip}"

    @property
    def chips(self) -> int:
        return math.prod(self.grid) * self.slices

    @property
    def devices(self) -> int:
        """JAX devices, of which some versions have two a chip."""
        return self.chips * self.chip.devices_per_chip

    def __str__(self) -> str:
        whole = self.name if self.slices == 1 else f"{self.slices} x {self.name}"
        return f"{whole} ({self.accelerator})" if self.accelerator else whole


def parse(name: str, slices: int = 1) -> Topology:
    """The slice that a name of either kind means.

    Raises TopologyError with the nearest names for one that there is not.
    """
    if slices < 1:
        raise TopologyError(f"slices: {slices} is none; give 1 or more")
    text = name.strip().lower()
    for topology in _all():
        if text in _names(topology):
            return Topology(topology.chip, topology.grid, slices)
    chip, grid = _grid(text)
    if chip is not None and len(grid) == 3 and _buildable(chip, grid):
        return Topology(chip, grid, slices)
    raise TopologyError(f"topology {name!r}: there is no such TPU slice{_nearest(text)}")


def sizes(chip: Chip) -> list[Topology]:
    """The slices of a version, smallest first."""
    return [Topology(chip, tuple(map(int, g.split("x")))) for g in GRIDS[str(chip.topology)]]


def devices(topology: Topology) -> list[Any]:
    """Devices (`jax.Device`) to compile for; none can run anything.

    Raises TopologyError if libtpu is not installed or does not know the slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(
            "compiling for TPUs takes libtpu, which is not installed: pip install 'pythia-jax[tpu]'"
        )
    # Here, so that this module can be asked for the environment before JAX comes in.
    from jax.experimental import topologies

    options: dict[str, object] = {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if topology.chip.topology == "v4":
        options["chip_config_name"] = "megacore"  # Both cores of a chip as one device.
    if math.prod(topology.grid) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **options
        )
    except (RuntimeError, NotImplementedError) as error:
        raise TopologyError(f"topology {topology}: libtpu refuses it: {error}") from error
    return list(described.devices)


def prepare_environment() -> None:
    """Make this process one that only compiles. To be called before JAX is imported."""
    os.environ.update(ENVIRONMENT)


def _all() -> Iterator[Topology]:
    for chip in CHIPS:
        if chip.topology in GRIDS:
            yield from sizes(chip)


def _names(topology: Topology) -> set[str]:
    """Every name of a slice: grid and accelerator type, by either name of the version."""
    chip, grid = topology.chip, topology.name.partition(":")[2]
    names = {topology.name, f"{chip.cloud}:{grid}"}
    if topology.accelerator:
        number = topology.accelerator.rpartition("-")[2]
        names |= {topology.accelerator, f"{chip.topology}-{number}"}
    return names


def _grid(text: str) -> tuple[Chip | None, tuple[int, ...]]:
    found = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)+)", text)
    if not found:
        return None, ()
    chips = [chip for chip in CHIPS if found[1] in (chip.topology, chip.cloud)]
    return (chips[0] if chips else None), tuple(map(int, found[2].split("x")))


def _buildable(chip: Chip, grid: tuple[int, ...]) -> bool:
    """Whether a grid of v4 or v5p is to be had: whole cubes of 4 x 4 x 4, in rising order."""
    largest = math.prod(sizes(chip)[-1].grid)
    cubes = all(side % 4 == 0 and side > 0 for side in grid)
    return cubes and list(grid) == sorted(grid) and math.prod(grid) <= largest


def _nearest(text: str) -> str:
    """The names to try instead."""
    version, _, rest = re.sub("[-:]", " ", text, count=1).partition(" ")
    own = [t for t in _all() if version in (t.chip.topology, t.chip.cloud)]
    if not own:
        known = sorted({n for t in _all() for n in _names(t)})
        close = difflib.get_close_matches(text, known, n=3, cutoff=0.5)
        some = f"; did you mean {', '.join(close)}?" if close else ""
        return f"{some or ';'} known versions are {', '.join(GRIDS)}, named as v5e:4x4 or v5e-16"
    numbers = [int(n) for n in re.findall(r"\d+", rest)]
    wanted = (
        math.prod(numbers) / (1 if "x" in rest else own[0].chip.cores_per_chip) if numbers else 1
    )
    own.sort(key=lambda t: abs(math.log(t.chips / max(wanted, 1e-9))))
    both = [f"{t.name} or {t.accelerator}" if t.accelerator else t.name for t in own[:3]]
    return f"; the nearest of this version are {', '.join(both)}"
