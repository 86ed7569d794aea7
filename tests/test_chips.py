"""The table of accelerators: names as drivers report them, dense peaks, memory as XLA has it."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from pythia_jax.chips import CHIPS, GIB, of_device_kind, of_topology

TPUS = [chip for chip in CHIPS if chip.platform == "tpu"]


# Google's Cloud TPU pages and NVIDIA's data sheets; TFLOP/s of a device, GiB.
@pytest.mark.parametrize(
    ("kind", "dtype", "peak", "memory"),
    [
        ("TPU v3", "bfloat16", 61.5, 16),
        ("TPU v4", "bfloat16", 275, 32),
        ("TPU v5 lite", "bfloat16", 197, 16),
        ("TPU v5", "bfloat16", 459, 96),
        ("TPU v6 lite", "bfloat16", 918, 32),
        ("TPU7x", "float8_e4m3fn", 2307, 96),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312, 40),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989, 80),
        ("NVIDIA H100 PCIe", "bfloat16", 756, 80),
        ("NVIDIA H200", "bfloat16", 989, 141),
        ("Tesla V100-SXM2-16GB", "float16", 125, 16),
    ],
)
def test_peaks_are_those_that_makers_print_without_sparsity(
    kind: str, dtype: str, peak: float, memory: float
) -> None:
    chip = of_device_kind(kind)
    assert chip is not None
    assert chip.peak_flops[dtype] == pytest.approx(peak * 1e12)
    assert chip.hbm_bytes == memory * GIB


def test_a_name_means_one_chip() -> None:
    kinds = [kind for chip in CHIPS for kind in chip.device_kinds]
    assert len(set(kinds)) == len(kinds)
    names = [chip.name for chip in CHIPS]
    assert len(set(names)) == len(names)


def test_a_card_without_the_makers_name_is_known_and_a_part_of_one_is_not() -> None:
    card = of_device_kind("A100-SXM4-40GB")
    assert card is not None and card is of_device_kind("NVIDIA A100-SXM4-40GB")
    assert of_device_kind("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert of_device_kind("cpu") is None


def test_a_topology_names_its_chip() -> None:
    assert of_topology("v5e:4x4") is of_topology("v5e") is of_device_kind("TPU v5 lite")
    assert of_topology("v9:2x2") is None


def test_no_chip_multiplies_faster_in_more_bits() -> None:
    for chip in CHIPS:
        assert set(chip.native) <= set(chip.peak_flops)
        peaks = chip.peak_flops
        assert peaks.get("float32", 0) < min(peaks[dtype] for dtype in chip.native)
        assert ("float32" in peaks) == (chip.platform == "gpu")


# A program that no chip holds: the compiler says how much it could have had.
TOO_LARGE = """
import json, re, jax, jax.numpy as jnp
from jax.experimental import topologies
found = {}
for name in ("v2:2x2", "v3:2x2", "v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"):
    mega = dict(chip_config_name="megacore", chips_per_host_bounds=(2, 2, 1))
    how = mega if name.startswith("v4") else {}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **how).devices
    place = jax.sharding.SingleDeviceSharding(devices[0])
    x = jax.ShapeDtypeStruct((400, 1024, 1024, 256), jnp.float32, sharding=place)
    try:
        jax.jit(lambda x: jnp.sin(x) + 1).lower(x).compile()
    except Exception as error:
        limit = re.search(r"available HBM \\(([0-9.]+)G\\)", str(error))
        found[name] = [devices[0].device_kind, len(devices) / 4, float(limit.group(1))]
print(json.dumps(found))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="asks libtpu's compiler")
def test_libtpu_reports_these_kinds_devices_and_limits() -> None:
    quiet = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TOO_LARGE],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **quiet},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name.split(":")[0] for name in found} == {chip.topology for chip in TPUS}
    for name, (kind, devices_per_chip, limit) in found.items():
        chip = of_topology(name)
        assert chip is not None and chip.usable_bytes is not None
        assert chip is of_device_kind(kind)
        assert chip.devices_per_chip == devices_per_chip
        # Versions of libtpu keep more or less of it for themselves.
        assert chip.usable_bytes / GIB == pytest.approx(limit, rel=0.02)
        assert chip.usable_bytes < chip.hbm_bytes
