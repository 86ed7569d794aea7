"""The shipped configs on the topologies that they name: compiled, all of them.

UPDATE_GOLDEN=1 writes golden files, the table of docs/plan.md and the configs' comments anew.
"""

import re
from pathlib import Path

import pytest
from plan_cases import (
    ROOT,
    UPDATE,
    compare_with_golden,
    compiler,  # noqa: F401
    planned,
    skip_unless_pinned,
)

from pythia_jax.chips import GIB
from pythia_jax.suite import SUITE
from pythia_jax.training.plan import Plan, plan
from pythia_jax.training.topologies import parse

TABLE = ROOT / "docs" / "plan.md"
COMMENT = re.compile(
    r"# Compiled for (\S+), (\d+) chips: (\S+) of (\S+) GiB a chip \(docs/plan.md\)"
)


def configs_of(size: str) -> list[Path]:
    """A size's config, and that of its deduplicated twin if it has one."""
    names = [f"pythia-{size}.yaml", f"pythia-{size}-deduped.yaml"]
    return [path for name in names if (path := ROOT / "configs" / name).exists()]


def comment(path: Path) -> re.Match[str]:
    found = COMMENT.search(path.read_text())
    assert found, f"{path.name} names no topology that it was compiled for"
    return found


def row(size: str, made: Plan) -> str:
    """The line of the table in docs/plan.md."""
    training = made.config.training
    assert made.memory is not None and made.seconds is not None
    hours = made.seconds * training.steps / 3600
    cells = (
        size,
        made.topology.name,
        made.topology.accelerator,
        made.topology.chips,
        training.gradient_accumulation,
        made.microbatch,
        training.remat,
        f"{made.state.kept / GIB:.2f}",
        f"{made.memory.needed / GIB:.2f}",
        f"{-made.excess / GIB:.2f}",
        f"{made.sent / GIB:.1f}",
        f"{made.flops / 1e15:.3g}",
        f"{made.seconds:.3g}",
        f"{hours:,.0f}",
        f"{hours * made.topology.chips:,.0f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def compare_with_docs(size: str, made: Plan) -> None:
    """Comments and table say what the compiler says."""
    skip_unless_pinned()
    assert made.memory is not None
    told = (
        f"# Compiled for {made.topology.name}, {made.topology.chips} chips: "
        f"{made.memory.needed / GIB:.2f} of {made.limit / GIB:.2f} GiB a chip (docs/plan.md)"
    )
    line = row(size, made)
    if UPDATE:
        for path in configs_of(size):
            path.write_text(COMMENT.sub(told, path.read_text()))
        text = TABLE.read_text()
        old = re.compile(rf"^\| {re.escape(size)} \| .*$", re.MULTILINE)
        TABLE.write_text(old.sub(lambda _: line, text))
    assert {comment(path)[0] for path in configs_of(size)} == {told}
    assert line in TABLE.read_text().splitlines()


@pytest.mark.parametrize("size", SUITE)
def test_twins_name_the_same_topology_and_figures(size: str) -> None:
    assert len({comment(path)[0] for path in configs_of(size)}) == 1


@pytest.mark.parametrize("size", SUITE)
def test_the_table_has_the_figures_of_the_comment(size: str) -> None:
    topology, chips, needed, _ = comment(configs_of(size)[0]).groups()
    (line,) = (x for x in TABLE.read_text().splitlines() if x.startswith(f"| {size} |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert (cells[1], cells[3], cells[8]) == (topology, chips, needed)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("size", SUITE)
def test_each_size_fits_the_topology_that_its_config_names(size: str) -> None:
    made = planned(size, comment(configs_of(size)[0])[1])
    assert made.fits
    if size in ("70m", "410m"):
        compare_with_golden(made, f"pythia-{size}_{made.topology.name.replace(':', '-')}")
    compare_with_docs(size, made)


ELSEWHERE = [
    ("70m", "v4:2x2x4", 1),
    ("70m", "v5p:2x2x4", 1),
    ("70m", "v6e:4x4", 1),
    ("1.4b", "v4:2x4x4", 4),
    ("1.4b", "v5p:2x4x4", 2),
    ("1.4b", "v6e:8x8", 2),
    ("12b", "v4:4x4x4", 4),
    ("12b", "v5p:4x4x4", 4),
    ("12b", "v6e:16x16", 1),
]
"""Sizes on the chips that no shipped config names, with the gradient accumulation it takes."""


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("size", "topology", "accumulation"), ELSEWHERE)
def test_small_middling_and_large_fit_every_other_chip(
    size: str, topology: str, accumulation: int
) -> None:
    settings = {"remat": "full", "gradient_accumulation": str(accumulation)}
    made = planned(size, topology, **{f"training__{key}": v for key, v in settings.items()})
    assert made.fits
    assert made.attention == "splash"
    assert made.native
    assert made.memory is not None and made.memory.aliased >= made.state.kept


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_two_slices_keep_a_copy_each() -> None:
    one = planned("70m", "v5e:4x4")
    two = plan(one.config, parse("v5e:4x4", 2))
    assert two.fits and two.mesh["slices"] == 2
    assert two.state == one.state
    assert two.microbatch == one.microbatch // 2
    assert two.seconds == pytest.approx((one.seconds or 0) / 2)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_no_loop_of_the_loss_moves_the_unembedding_on_a_pod() -> None:
    # With accumulation, its own loop is around everything: one gather and one reduction each time.
    made = planned("70m", "v5e:4x4", training__gradient_accumulation="4", training__remat="full")
    model = made.config.model
    assert model is not None
    size = model.vocab_size * model.hidden_size
    large = [c for c in made.collectives if c.elements >= size]
    assert large and {c.loops for c in large} <= {(), (4,)}
    of_loss = [c for c in large if "shard_map" in c.op_name]
    assert all(c.times <= 4 for c in of_loss)
    assert len([c for c in of_loss if c.kind == "all-gather"]) == 1
