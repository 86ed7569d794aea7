"""Names of TPU slices, and devices to compile for."""

import importlib.util
import subprocess
import sys

import pytest
from plan_cases import compiler  # noqa: F401

from pythia_jax.training import topologies
from pythia_jax.training.topologies import Topology, TopologyError, parse

SAME = [  # grid, accelerator type, chips: as the cloud's documentation has them
    ("v5e:4x4", "v5litepod-16", 16),
    ("v5e:4x4", "v5e-16", 16),
    ("v5e:16x16", "v5litepod-256", 256),
    ("v6e:8x8", "v6e-64", 64),
    ("v4:2x2x1", "v4-8", 4),
    ("v4:2x2x4", "v4-32", 16),
    ("v4:4x4x4", "v4-128", 64),
    ("v5p:2x4x4", "v5p-64", 32),
    ("v5p:4x4x8", "v5p-256", 128),
]


@pytest.mark.parametrize(("grid", "accelerator", "chips"), SAME)
def test_both_names_of_a_slice_mean_the_same(grid: str, accelerator: str, chips: int) -> None:
    assert parse(grid) == parse(accelerator)
    assert parse(grid).name == grid
    assert parse(grid).chips == chips


@pytest.mark.parametrize("chip", [c for c in topologies.CHIPS if c.topology in topologies.GRIDS])
def test_every_listed_slice_has_names_that_lead_back_to_it(chip: topologies.Chip) -> None:
    for topology in topologies.sizes(chip):
        assert parse(topology.name) == topology
        if topology.accelerator:
            assert parse(topology.accelerator) == topology


def test_no_two_slices_share_a_name() -> None:
    every = [
        name
        for chip in topologies.CHIPS
        if chip.topology in topologies.GRIDS
        for topology in topologies.sizes(chip)
        for name in {topology.name, topology.accelerator} - {None}
    ]
    assert len(every) == len(set(every))


def test_larger_grids_of_whole_cubes_are_taken() -> None:
    assert parse("v5p:4x4x12").chips == 192
    assert parse("v5p:4x4x12").accelerator is None  # v5p-384 may be another grid


def test_slices_multiply() -> None:
    assert parse("v5e:4x4", 2).chips == 32
    assert str(parse("v5e:4x4", 2)) == "2 x v5e:4x4 (v5litepod-16)"


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("v5e:3x3", "v5e:2x4 or v5litepod-8"),
        ("v5e-20", "v5e:4x4 or v5litepod-16"),
        ("v4-33", "v4:2x2x4 or v4-32"),
        ("v5p:8x4x4", "v5p:4x4x8 or v5p-256"),
        ("v4:0x4x4", "v4:2x2x1"),
        ("v6:4x4", "v6e:4x4"),
        ("h100", "known versions are v2"),
        ("", "known versions are v2"),
    ],
)
def test_a_slice_that_there_is_not_is_refused_with_the_nearest(name: str, instead: str) -> None:
    with pytest.raises(TopologyError, match="there is no such TPU slice") as refused:
        parse(name)
    assert instead in str(refused.value)


def test_no_slices_are_refused() -> None:
    with pytest.raises(TopologyError, match="slices: 0"):
        parse("v5e:4x4", 0)


def test_without_libtpu_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TopologyError, match=r"pip install 'pythia-jax\[tpu\]'"):
        topologies.devices(parse("v5e:4x4"))


def test_the_environment_can_be_set_before_jax_comes_in() -> None:
    code = (
        "import os, sys, pythia_jax.cli; from pythia_jax.training import topologies as t;"
        "t.prepare_environment(); assert 'jax' not in sys.modules;"
        "assert t.ENVIRONMENT.items() <= os.environ.items()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "name", ["v4:2x2x4", "v5e:1x1", "v5e:4x4", "v5p:4x4x12", "v6e:1x1", "v6e:8x16", "tpu7x:2x2x1"]
)
@pytest.mark.usefixtures("compiler")
def test_libtpu_knows_the_slice_and_its_chips(name: str) -> None:
    topology = parse(name)
    devices = topologies.devices(topology)
    assert len(devices) == topology.devices
    assert {device.device_kind for device in devices} <= set(topology.chip.device_kinds)


@pytest.mark.usefixtures("compiler")
def test_slices_are_told_apart() -> None:
    devices = topologies.devices(parse("v5e:2x2", 2))
    assert sorted(device.slice_index for device in devices) == [0] * 4 + [1] * 4


@pytest.mark.usefixtures("compiler")
def test_what_libtpu_does_not_know_is_refused_in_its_words() -> None:
    chip = parse("v5e:4x4").chip
    with pytest.raises(TopologyError, match=r"v5e:3x3.*libtpu refuses it"):
        topologies.devices(Topology(chip, (3, 3)))
