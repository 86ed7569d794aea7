"""The accelerators that runs meet: how fast their matrix units are, how much they hold.

Peaks are dense ones, in FLOP/s of one JAX device. Makers like to print those with 2:4 sparsity,
which are twice as high: 1979 TFLOP/s for an H100 that has 989.

Sources: Google's Cloud TPU documentation (system architecture, one page a version); NVIDIA's data
sheets. `usable_bytes` is what the compiler of libtpu 0.0.42.1 says is left ("exceeds available
HBM") when it refuses a program that is too large for the chip.
"""

from collections.abc import Mapping
from dataclasses import dataclass

GIB = 1024**3
TERA = 1e12


@dataclass(frozen=True)
class Chip:
    """One kind of accelerator. Everything is told of one JAX device, which may be half a chip.

    device_kinds: `jax.Device.device_kind`, as the drivers report it.
    peak_flops: dense FLOP/s by dtype of the factors, products summed in float32 (int8: int32). A
        dtype without an entry has no published peak; float32, where it stands, is without tensor
        cores, for we never round float32 on its way into them.
    hbm_bytes: memory as the maker states it. usable_bytes: what XLA leaves to a program, where it
        is known.
    native: dtypes that the matrix unit multiplies as they are; others are converted, or taken
        apart into several products.
    platform: JAX's name of the backend.
    topology: what libtpu calls the version in a topology (`v5e` in `v5e:4x4`); None for GPUs.
    cloud: what Google Cloud calls it in an accelerator type (`v5litepod` in `v5litepod-16`).
    cores_per_chip: TensorCores, which the number in `v4-32` counts. devices_per_chip: 2 where
        each core is a JAX device of its own, 1 where the chip is one.
    chips_per_host: in a slice of several hosts.
    """

    name: str
    device_kinds: tuple[str, ...]
    peak_flops: Mapping[str, float]
    hbm_bytes: int
    native: tuple[str, ...]
    usable_bytes: int | None = None
    platform: str = "gpu"
    topology: str | None = None
    cloud: str | None = None
    cores_per_chip: int = 1
    devices_per_chip: int = 1
    chips_per_host: int | None = None


def _tpu(
    version: str,
    kinds: tuple[str, ...],
    peaks: dict[str, float],
    hbm: float,
    usable: float,
    *,
    cloud: str | None = None,
    cores: int = 1,
    devices: int = 1,
) -> Chip:
    """A TPU: peaks in TFLOP/s of a whole chip, memory in GiB of a device."""
    return Chip(
        name=f"TPU {version.removeprefix('tpu')}",
        device_kinds=kinds,
        peak_flops={dtype: peak * TERA / devices for dtype, peak in peaks.items()},
        hbm_bytes=round(hbm * GIB),
        native=tuple(peaks),
        usable_bytes=round(usable * GIB),
        platform="tpu",
        topology=version,
        cloud=cloud or version,
        cores_per_chip=cores,
        devices_per_chip=devices,
        chips_per_host=4,
    )


def _gpu(
    name: str, memory: int, half: float, single: float, *kinds: str, bfloat16: bool = True
) -> Chip:
    """A GPU: memory in GiB; TFLOP/s in 16 bits and in float32 without tensor cores."""
    sixteen = ("bfloat16", "float16") if bfloat16 else ("float16",)
    return Chip(
        name=name,
        device_kinds=kinds,
        peak_flops={**dict.fromkeys(sixteen, half * TERA), "float32": single * TERA},
        hbm_bytes=memory * GIB,
        native=sixteen,
    )


CHIPS: tuple[Chip, ...] = (
    _tpu("v2", ("TPU v2",), {"bfloat16": 46}, 8, 7.48, cores=2, devices=2),
    _tpu("v3", ("TPU v3",), {"bfloat16": 123}, 16, 15.48, cores=2, devices=2),
    # Two cores that act as one device ("megacore").
    _tpu("v4", ("TPU v4",), {"bfloat16": 275, "int8": 275}, 32, 30.75, cores=2),
    _tpu(
        "v5e",
        ("TPU v5 lite", "TPU v5e"),
        {"bfloat16": 197, "int8": 393},
        16,
        15.75,
        cloud="v5litepod",
    ),
    _tpu("v5p", ("TPU v5", "TPU v5p"), {"bfloat16": 459, "int8": 918}, 96, 95.74, cores=2),
    _tpu(
        "v6e",
        ("TPU v6 lite", "TPU v6e"),
        {"bfloat16": 918, "int8": 1836, "float8_e4m3b11fnuz": 918, "float8_e5m2": 918},
        32,
        31.25,
    ),
    _tpu(
        "tpu7x",
        ("TPU7x", "TPU v7x"),
        {"bfloat16": 2307, "float8_e4m3fn": 4614, "float8_e5m2": 4614},
        96,
        94.75,
        cores=2,
        devices=2,
    ),
    _gpu("V100 PCIe 16 GB", 16, 112, 14, "Tesla V100-PCIE-16GB", bfloat16=False),
    _gpu("V100 PCIe 32 GB", 32, 112, 14, "Tesla V100-PCIE-32GB", bfloat16=False),
    _gpu("V100 SXM2 16 GB", 16, 125, 15.7, "Tesla V100-SXM2-16GB", bfloat16=False),
    _gpu("V100 SXM2 32 GB", 32, 125, 15.7, "Tesla V100-SXM2-32GB", bfloat16=False),
    _gpu("T4", 16, 65, 8.1, "Tesla T4", bfloat16=False),
    _gpu("A10G", 24, 70, 35, "NVIDIA A10G"),
    _gpu("A100 40 GB", 40, 312, 19.5, "NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
    _gpu("A100 80 GB", 80, 312, 19.5, "NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
    _gpu("RTX 3090", 24, 71, 35.6, "NVIDIA GeForce RTX 3090"),
    _gpu("RTX 4090", 24, 165.2, 82.6, "NVIDIA GeForce RTX 4090"),
    _gpu("L4", 24, 121, 30.3, "NVIDIA L4"),
    _gpu("L40S", 48, 362, 91.6, "NVIDIA L40S"),
    _gpu("H100 PCIe", 80, 756, 51, "NVIDIA H100 PCIe"),
    _gpu("H100 SXM", 80, 989, 67, "NVIDIA H100 80GB HBM3"),
    _gpu("H100 NVL", 94, 835, 60, "NVIDIA H100 NVL"),
    _gpu("GH200", 96, 989, 67, "NVIDIA GH200 480GB"),
    _gpu("H200 SXM", 141, 989, 67, "NVIDIA H200"),
    _gpu("H200 NVL", 141, 835, 60, "NVIDIA H200 NVL"),
    _gpu("B200", 180, 2250, 75, "NVIDIA B200"),
)

_BY_KIND = {kind: chip for chip in CHIPS for kind in chip.device_kinds}
_BY_TOPOLOGY = {chip.topology: chip for chip in CHIPS if chip.topology}


def of_device_kind(kind: str) -> Chip | None:
    """The chip that a `device_kind` means; None for one that is not in the table.

    The whole name counts: a slice of a card (`NVIDIA H100 80GB HBM3 MIG 1g.10gb`) is not the card.
    """
    # Older drivers leave the maker's name out.
    return _BY_KIND.get(kind) or _BY_KIND.get(f"NVIDIA {kind}")


def of_topology(name: str) -> Chip | None:
    """The chip of a libtpu topology, `v5e:4x4` or only `v5e`; None for one not in the table."""
    return _BY_TOPOLOGY.get(name.partition(":")[0])
