"""Sweeps over layouts, on a compiler that is a formula; and one on the real one."""

import dataclasses
import json

import pytest
from plan_cases import compiler, shipped  # noqa: F401

from pythia_jax.chips import GIB
from pythia_jax.configs import ConfigError, RunConfig
from pythia_jax.training import plan_sweep
from pythia_jax.training.collectives import Collective
from pythia_jax.training.plan import Memory, Plan, State
from pythia_jax.training.plan_sweep import Layout, describe, layouts, sweep, to_dict
from pythia_jax.training.topologies import Topology, parse

PLACE = parse("v5e:4x4")
LIMIT = 15.75


class Formula:
    """Stands for `plan`: memory by rows and remat, bytes as given; remembers what was asked."""

    def __init__(self, gib_a_row: dict[str, float], sent: float = 1e9) -> None:
        self.gib_a_row, self.sent = gib_a_row, sent
        self.asked: list[RunConfig] = []

    def __call__(self, config: RunConfig, topology: Topology, mfu: float) -> Plan:
        self.asked.append(config)
        training, mesh = config.training, config.mesh
        sizes = {"slices": mesh.slices, "data": mesh.data, "fsdp": mesh.fsdp, "tensor": mesh.tensor}
        made = Plan(
            config=config,
            topology=topology,
            mesh=sizes,
            attention="splash",
            state=State(0, 0, 0, 0),
            memory=None,
            refusal=None,
            flops=1e15,
            mfu=mfu,
            collectives=(Collective("all-gather", 1, self.sent, 1, 2, (), ""),),
        )
        peak = round(made.microbatch * self.gib_a_row[training.remat] * GIB)
        return dataclasses.replace(made, memory=Memory(0, 0, 0, 0, peak))


def swept(monkeypatch: pytest.MonkeyPatch, formula: Formula, size: str = "70m") -> plan_sweep.Swept:
    monkeypatch.setattr(plan_sweep, "plan", formula)
    return sweep(shipped(size), PLACE, 0.4)


def test_every_layout_cuts_model_and_batch_evenly() -> None:
    config = shipped("160m")  # 12 heads, so that tensor 8 does not go
    found = list(layouts(config, PLACE))
    assert len(found) == len(set(found))
    for layout in found:
        assert layout.data * layout.fsdp * layout.tensor == 16
        assert 1024 % (layout.accumulation * layout.data * layout.fsdp) == 0
    assert {layout.tensor for layout in found} == {1, 2, 4}
    assert {layout.remat for layout in found} == {"none", "dots", "full"}
    assert Layout(1, 16, 1, "full", 64) in found


def test_what_fits_is_ranked_and_the_search_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    formula = Formula({"none": 0.5, "dots": 0.2, "full": 0.1})
    found = swept(monkeypatch, formula)
    assert len(found.ranked) == plan_sweep.ENOUGH
    seconds = [estimate for _, _, estimate in found.ranked]
    assert seconds == sorted(seconds)
    assert all(made.fits for _, made, _ in found.ranked)
    assert found.untried > 0


def test_a_refusal_rules_out_what_must_need_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    formula = Formula({"none": 100, "dots": 100, "full": 0.5})  # 31 rows at most, by full remat
    found = swept(monkeypatch, formula)
    refused_by_compiler = len(formula.asked) - len(found.ranked)
    # One for each policy and each cut by `tensor`, or little more; not each of many meshes.
    assert refused_by_compiler < 20 < len(found.refused)
    assert {layout.remat for layout, _, _ in found.ranked} == {"full"}
    assert all(layout.rows(1024, 1) <= 31 for layout, _, _ in found.ranked)
    # And nothing was ruled out that would have fitted.
    gib_a_row = formula.gib_a_row
    assert all(r.rows(1024, 1) * gib_a_row[r.remat] > LIMIT for r in found.refused)


def test_nothing_fits_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    found = swept(monkeypatch, Formula({"none": 100, "dots": 100, "full": 100}))
    assert not found.ranked and found.untried == 0
    assert "Nothing fits v5e:4x4" in describe(found)


def test_the_table_names_the_first_and_says_what_seconds_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = swept(monkeypatch, Formula({"none": 0.5, "dots": 0.2, "full": 0.1}))
    told = describe(found)
    assert told.endswith(f"The first: {found.ranked[0][0].flags()}")
    assert "Seconds are no measurement" in told
    values = json.loads(json.dumps(to_dict(found)))
    assert [v["estimated_seconds"] for v in values["ranked"]] == [s for _, _, s in found.ranked]


def test_the_estimate_is_work_and_traffic_added(monkeypatch: pytest.MonkeyPatch) -> None:
    found = swept(monkeypatch, Formula({"none": 0.1, "dots": 0.1, "full": 0.1}, sent=200e9))
    layout, made, seconds = found.ranked[0]
    assert layout.remat == "none"
    compute = plan_sweep.guess(Layout(1, 1, 1, "none", 1), made.config, parse("v5e:1x1"), 0.4) / 16
    assert seconds == pytest.approx(compute + 1.0)  # v5e sends 200 GB a second


def test_recomputing_costs_and_more_microbatches_send_more() -> None:
    config = shipped("1.4b")

    def seconds(remat: str, accumulation: int) -> float:
        return plan_sweep.guess(Layout(1, 16, 1, remat, accumulation), config, PLACE, 0.4)

    assert seconds("none", 1) == seconds("dots", 1) < seconds("full", 1)
    assert seconds("full", 1) < seconds("full", 2)


def test_chips_whose_links_are_not_known_are_refused() -> None:
    with pytest.raises(ConfigError, match="links is not known"):
        sweep(shipped("70m"), parse("v3:2x2"), 0.4)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_a_real_sweep_finds_layouts_that_fit() -> None:
    found = sweep(shipped("14m", training__batch_size="64"), parse("v5e:2x2"), 0.4)
    assert len(found.ranked) == plan_sweep.ENOUGH
    assert all(made.memory is not None and made.fits for _, made, _ in found.ranked)
