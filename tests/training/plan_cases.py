"""For the tests of plans: libtpu's environment, and values pinned to one compiler."""

import json
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from pythia_jax import configs
from pythia_jax.training import topologies
from pythia_jax.training.plan import Plan, plan

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden")
PINNED = {"jax": "0.10.2", "libtpu": "0.0.42.1"}
"""The pair whose numbers the golden files and docs/plan.md hold."""
UPDATE = bool(os.environ.get("UPDATE_GOLDEN"))


@pytest.fixture(scope="session")
def compiler() -> Iterator[None]:
    """libtpu, quiet and shared; the test is skipped where it is not installed."""
    pytest.importorskip("libtpu", reason="compiling for TPUs takes libtpu: pip install '.[tpu]'")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in topologies.ENVIRONMENT.items():
            if not name.startswith("JAX_"):  # Other tests choose their own.
                patch.setenv(name, value)
        yield


def shipped(size: str, **overrides: str) -> configs.RunConfig:
    """A shipped config; `training__remat="none"` sets `training.remat`."""
    named = {key.replace("__", "."): value for key, value in overrides.items()}
    return configs.load(ROOT / "configs" / f"pythia-{size}.yaml", named)


def planned(size: str, topology: str, **overrides: str) -> Plan:
    return plan(shipped(size, **overrides), topologies.parse(topology))


def skip_unless_pinned() -> None:
    here = {name: metadata.version(name) for name in PINNED}
    if here != PINNED:
        pytest.skip(f"these numbers are those of {PINNED}, not of {here}")


def compare_with_golden(made: Plan, name: str) -> None:
    """Memory and collectives are what `golden/NAME.json` says; UPDATE_GOLDEN=1 writes it anew."""
    skip_unless_pinned()
    assert made.memory is not None
    values: dict[str, Any] = {
        "versions": PINNED,
        "topology": made.topology.name,
        "mesh": dict(made.mesh),
        "rows_a_device": made.microbatch,
        "attention": made.attention,
        "memory": vars(made.memory),
        "collectives": {kind: vars(total) for kind, total in made.traffic.items()},
    }
    path = GOLDEN / f"{name}.json"
    if UPDATE:
        path.write_text(json.dumps(values, indent=1) + "\n")
    assert values == json.loads(path.read_text())
