"""Layouts of a run on a topology: those that fit, the one that should be fastest first.

A layout is a mesh, a remat policy and a gradient accumulation. They are tried in the order of an
estimate of their step, and the estimate is told: FLOPs at the assumed MFU, recomputation included,
plus what is sent between chips at the speed of their links, as if nothing of it were hidden. The
bytes are guessed before a layout is compiled, and the compiled program's after. A refusal tells how
much was needed, which rules out others that keep as much of each row and take as many rows.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from pythia_jax.configs import ConfigError, RunConfig
from pythia_jax.model import parameters
from pythia_jax.sharding import mesh_shape
from pythia_jax.training.flops import forward_flops, model_flops
from pythia_jax.training.plan import GIB, Plan, over_slices, plan
from pythia_jax.training.plan_text import to_dict as plan_to_dict
from pythia_jax.training.topologies import SENDS, Topology

ENOUGH = 4
"""Layouts that fit, after which the search ends; compiling one takes a minute or more."""

MARGIN = 1.25
"""A layout is ruled out untried only if its forecast is so far above the limit: the compiler can
save some memory where it must."""

POLICIES = ("none", "dots", "full")


@dataclass(frozen=True)
class Layout:
    """What may be chosen freely without changing what is computed."""

    data: int
    fsdp: int
    tensor: int
    remat: str
    accumulation: int

    def of(self, config: RunConfig) -> RunConfig:
        """The config with this layout."""
        mesh = dataclasses.replace(config.mesh, data=self.data, fsdp=self.fsdp, tensor=self.tensor)
        training = dataclasses.replace(
            config.training, remat=self.remat, gradient_accumulation=self.accumulation
        )
        return dataclasses.replace(config, mesh=mesh, training=training)

    def flags(self) -> str:
        return (
            f"--mesh.data {self.data} --mesh.fsdp {self.fsdp} --mesh.tensor {self.tensor} "
            f"--training.remat {self.remat} --training.gradient-accumulation {self.accumulation}"
        )

    def rows(self, batch: int, slices: int) -> int:
        """Rows that a device works on at a time."""
        return batch // (self.accumulation * slices * self.data * self.fsdp)

    def slower(self, other: "Layout") -> bool:
        """Whether it only saves more memory than another, on the same mesh."""
        return (
            (self.data, self.fsdp, self.tensor) == (other.data, other.fsdp, other.tensor)
            and POLICIES.index(self.remat) >= POLICIES.index(other.remat)
            and self.accumulation >= other.accumulation
        )


@dataclass(frozen=True)
class Swept:
    """ranked: layouts that fit and their plans, the fastest by the estimate (seconds) first.

    refused: layouts that do not fit, most of them by forecast. untried: how many were left.
    """

    topology: Topology
    mfu: float
    ranked: list[tuple[Layout, Plan, float]]
    refused: list[Layout]
    untried: int


def sweep(config: RunConfig, topology: Topology, mfu: float) -> Swept:
    """Try layouts until `ENOUGH` fit. Progress goes to stderr.

    Raises ConfigError if no layout at all can cut the model and the batch on this topology, or
    the links of these chips are not known.
    """
    if config.model is None:
        raise ConfigError("model: missing; a plan needs one (for example size: 70m)")
    if topology.chip.topology not in SENDS:
        raise ConfigError(
            f"--sweep: the speed of {topology.chip.name}'s links is not known, so layouts cannot "
            f"be ranked; it is for {', '.join(SENDS)}"
        )
    config = over_slices(config, topology)
    open_layouts = sorted(
        layouts(config, topology), key=lambda layout: guess(layout, config, topology, mfu)
    )
    if not open_layouts:
        raise ConfigError(
            f"--sweep: {config.training.batch_size} rows and this model cannot be cut over "
            f"{topology.devices} devices; choose a smaller topology"
        )
    ranked: list[tuple[Layout, Plan, float]] = []
    refused: list[Layout] = []
    forecast = _Forecast(config, topology)
    with tqdm(total=len(open_layouts), unit=" layouts", desc="trying") as bar:
        while open_layouts and len(ranked) < ENOUGH:
            layout = open_layouts.pop(0)
            bar.set_postfix_str(f"{len(ranked)} fit; {layout.flags()}")
            made = plan(layout.of(config), topology, mfu)
            if made.fits:
                ranked.append((layout, made, estimate(made)))
                gone = [other for other in open_layouts if other.slower(layout)]
            else:
                forecast.learn(layout, made)
                gone = [other for other in open_layouts if forecast.hopeless(other)]
                refused += [layout, *gone]
            open_layouts = [other for other in open_layouts if other not in gone]
            bar.update(bar.total - len(open_layouts) - bar.n)
    ranked.sort(key=lambda found: found[2])
    return Swept(topology, mfu, ranked, refused, untried=len(open_layouts))


def layouts(config: RunConfig, topology: Topology) -> Iterator[Layout]:
    """Every layout that cuts model and batch into equal parts."""
    model = config.model
    assert model is not None
    batch = config.training.batch_size
    within = topology.devices // topology.slices
    for tensor, fsdp in itertools.product(_powers(8), _powers(within)):
        if within % (tensor * fsdp) or model.hidden_size % fsdp:
            continue
        if model.num_attention_heads % tensor or model.vocab_size % tensor:
            continue
        data = within // (tensor * fsdp)
        for remat, accumulation in itertools.product(POLICIES, _powers(64)):
            if batch % (accumulation * topology.slices * data * fsdp) == 0:
                yield Layout(data, fsdp, tensor, remat, accumulation)


def guess(layout: Layout, config: RunConfig, topology: Topology, mfu: float) -> float:
    """Seconds of a step, before anything is compiled.

    Each microbatch gathers the parameters twice in 2 bytes and reduces gradients once in 4; along
    `data` gradients are summed; along `tensor` each layer sums its output, forward and backward.
    """
    model = config.model
    assert model is not None
    _, data, fsdp, tensor = mesh_shape(layout.of(config).mesh, topology.devices)
    size = parameters.count(model) / tensor
    sent = layout.accumulation * size * (2 * 2 + 4) * (fsdp - 1) / fsdp
    sent += layout.accumulation * 2 * 4 * size / fsdp * (data - 1) / data
    rows = config.training.batch_size / (topology.devices / tensor)
    stream = rows * config.data.sequence_length * model.hidden_size * 2
    sums = 3 if layout.remat == "full" else 2
    sent += sums * model.num_hidden_layers * stream * 2 * (tensor - 1) / tensor
    return _compute(config, layout.remat, topology, mfu) + sent / SENDS[str(topology.chip.topology)]


def estimate(made: Plan) -> float:
    """Seconds of a step, by the bytes that the compiled program sends."""
    config, topology = made.config, made.topology
    compute = _compute(config, config.training.remat, topology, made.mfu)
    return compute + made.sent / SENDS[str(topology.chip.topology)]


def describe(swept: Swept) -> str:
    """A table of what fits, and the flags of the first."""
    if not swept.ranked:
        return (
            f"Nothing fits {swept.topology}: {len(swept.refused)} layouts were refused. A larger "
            "topology is needed; plan without --sweep says which"
        )
    head = ("mesh d x f x t", "remat", "accumulation", "GiB", "left", "sent GiB", "s a step")
    rows: list[tuple[str, ...]] = [head]
    for layout, made, seconds in swept.ranked:
        assert made.memory is not None
        rows.append(
            (
                f"{layout.data} x {layout.fsdp} x {layout.tensor}",
                layout.remat,
                str(layout.accumulation),
                f"{made.memory.needed / GIB:.2f}",
                f"{-made.excess / GIB:.2f}",
                f"{made.sent / GIB:.2f}",
                f"{seconds:.3g}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    untried = f", {swept.untried} slower by the guess were not tried" if swept.untried else ""
    return (
        f"{swept.topology}: {len(swept.ranked)} layouts fit, {len(swept.refused)} do not"
        f"{untried}\n\n{table}\n\n"
        f"Seconds are no measurement: FLOPs at {swept.mfu:.0%} MFU with what remat computes again, "
        "plus all\nthat a device sends at the speed of its links, none of it hidden behind work.\n"
        f"The first: {swept.ranked[0][0].flags()}"
    )


def to_dict(swept: Swept) -> dict[str, Any]:
    """Plain values, for JSON."""
    return {
        "ranked": [
            {**dataclasses.asdict(layout), "estimated_seconds": seconds, "plan": plan_to_dict(made)}
            for layout, made, seconds in swept.ranked
        ],
        "refused": [dataclasses.asdict(layout) for layout in swept.refused],
        "untried": swept.untried,
    }


class _Forecast:
    """Memory of layouts from that of others: what a row takes, by remat and the cut of `tensor`."""

    def __init__(self, config: RunConfig, topology: Topology) -> None:
        self._shape = (config.training.batch_size, topology.slices)
        self._limit = topology.chip.usable_bytes or topology.chip.hbm_bytes
        self._of_a_row: dict[tuple[str, int], float] = {}

    def learn(self, layout: Layout, made: Plan) -> None:
        """From a plan that does not fit. All beside the state is put down to the rows."""
        if made.refusal is not None and not made.refusal.compiled:
            return
        beside = made.limit + made.excess - made.state.kept
        self._of_a_row[layout.remat, layout.tensor] = beside / layout.rows(*self._shape)

    def hopeless(self, layout: Layout) -> bool:
        of_a_row = self._of_a_row.get((layout.remat, layout.tensor), 0.0)
        return of_a_row * layout.rows(*self._shape) > MARGIN * self._limit


def _powers(limit: int) -> list[int]:
    return [2**i for i in range(limit.bit_length()) if 2**i <= limit]


def _compute(config: RunConfig, remat: str, topology: Topology, mfu: float) -> float:
    """Seconds of the matrix products, at a share of bfloat16's peak."""
    assert config.model is not None
    shape = (config.training.batch_size, config.data.sequence_length)
    flops = model_flops(config.model, *shape)
    if remat == "full":
        forward = forward_flops(config.model, *shape)
        flops += forward["dense"] + forward["attention"]
    return flops / (topology.chip.peak_flops["bfloat16"] * topology.devices * mfu)
