"""What a run would need on TPUs that are not here: memory, traffic and work of its train step.

libtpu compiles the very step that the trainer runs, for devices that are described and not
present. Its memory is the compiler's own plan, the one that it refuses a program by. Nothing here
measures time: seconds follow from the FLOPs of the model and a utilisation (MFU) that is assumed.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pythia_jax import sharding
from pythia_jax.configs import ConfigError, RunConfig
from pythia_jax.training import topologies
from pythia_jax.training.collectives import Collective, Total, collectives, totals
from pythia_jax.training.flops import model_flops
from pythia_jax.training.step import TrainState, abstract_state, jitted_train_step
from pythia_jax.training.topologies import Topology
from pythia_jax.training.trainer import on_devices

MFU = 0.4
"""Share of a chip's peak that is assumed: what Levanter published for models of 1.4b (41.7 %)."""

GIB = 1024**3


@dataclass(frozen=True)
class State:
    """Bytes that a device holds of the train state, and of the gradients that every step makes.

    The gradients are all there at once, since they are clipped by their common norm. So state and
    gradients are the least that any setting of the step takes.
    """

    parameters: int
    moments: int
    counters: int
    gradients: int

    @property
    def kept(self) -> int:
        """What lives from step to step."""
        return self.parameters + self.moments + self.counters

    @property
    def least(self) -> int:
        return self.kept + self.gradients


@dataclass(frozen=True)
class Memory:
    """Bytes of a device's memory, as the compiler planned them.

    arguments: state and batch, with what their layout in tiles adds. aliased: outputs that take
    the place of the donated state. program: its code. peak: all buffers that are alive at once.
    """

    arguments: int
    batch: int
    aliased: int
    program: int
    peak: int

    @property
    def temporaries(self) -> int:
        """Activations, gradients and all else that lives within the step."""
        return self.peak - self.arguments

    @property
    def needed(self) -> int:
        return self.peak + self.program


@dataclass(frozen=True)
class Refusal:
    """Why nothing was compiled: `needed` of `limit` bytes a device.

    compiled: whether the compiler said so, or the arithmetic of the state. largest: the largest
    buffers, where the compiler names them.
    """

    needed: int
    limit: int
    compiled: bool
    largest: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A config on a topology. memory is None, and refusal is not, where it was not compiled.

    config: as given, but for `mesh.slices`. mesh: sizes of its axes. flops: of a step, by the
    convention of `pythia_jax.training.flops`. counted_flops: what the compiler counts of one
    device's program, which takes the body of a loop once and kernels not at all.
    """

    config: RunConfig
    topology: Topology
    mesh: Mapping[str, int]
    attention: str
    state: State
    memory: Memory | None
    refusal: Refusal | None
    flops: float
    mfu: float
    counted_flops: float | None = None
    collectives: tuple[Collective, ...] = ()

    @property
    def limit(self) -> int:
        """Bytes of a device's memory that the compiler may give out."""
        return self.topology.chip.usable_bytes or self.topology.chip.hbm_bytes

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.memory.needed <= self.limit

    @property
    def excess(self) -> int:
        """Bytes missing on each device; 0 or less if it fits."""
        if self.refusal is not None:
            return self.refusal.needed - self.refusal.limit
        assert self.memory is not None
        return self.memory.needed - self.limit

    @property
    def traffic(self) -> dict[str, Total]:
        """The collectives of a step by kind."""
        return totals(self.collectives)

    @property
    def sent(self) -> int:
        """Bytes that a device sends a step."""
        return sum(total.sent for total in self.traffic.values())

    @property
    def sent_between_slices(self) -> int:
        """Bytes that a device sends a step by collectives that join slices."""
        return sum(
            t.sent for t in totals([c for c in self.collectives if c.between_slices]).values()
        )

    @property
    def native(self) -> bool:
        """Whether the chip's matrix unit takes the run's precision as it is."""
        return self.config.training.precision in self.topology.chip.native

    @property
    def microbatch(self) -> int:
        """Rows that one device works on at a time."""
        training = self.config.training
        rows = math.prod(self.mesh[axis] for axis in sharding.ROWS)
        return training.batch_size // training.gradient_accumulation // rows

    @property
    def seconds(self) -> float | None:
        """Of a step at the assumed MFU; None for a precision whose peak nobody states."""
        peak = self.topology.chip.peak_flops.get(self.config.training.precision)
        if peak is None:
            return None
        return self.flops / (peak * self.topology.devices * self.mfu)


def plan(config: RunConfig, topology: Topology, mfu: float = MFU) -> Plan:
    """Compile the train step of `config` for `topology`, and tell what it takes.

    A state that alone is too large is refused by arithmetic, in a moment; `mesh.slices` becomes
    that of the topology.

    Raises ConfigError if the mesh fits neither devices nor model, or there is no model;
    TopologyError if libtpu is missing; ValueError for an attention kernel that cannot run there.
    """
    if config.model is None:
        raise ConfigError("model: missing; a plan needs one (for example size: 70m)")
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu: {mfu} is no share of the peak; give a number above 0, up to 1")
    model, config = config.model, over_slices(config, topology)
    mesh = sharding.make_mesh(config.mesh, topologies.devices(topology))
    resolved = on_devices(config, mesh)
    state = abstract_state(resolved, mesh)
    training = config.training
    made = Plan(
        config=config,
        topology=topology,
        mesh=dict(mesh.shape),
        attention=resolved.training.attention,
        state=state_bytes(state),
        memory=None,
        refusal=None,
        flops=model_flops(model, training.batch_size, config.data.sequence_length),
        mfu=mfu,
    )
    if made.state.least > made.limit:
        refusal = Refusal(made.state.least, made.limit, compiled=False)
        return dataclasses.replace(made, refusal=refusal)
    return _compiled(made, resolved, mesh, state)


def state_bytes(state: TrainState) -> State:
    """What one device holds of a state that knows where its arrays lie."""
    parameters = _held(state.params)
    counters = [x for x in jax.tree.leaves(state.opt_state) if not x.shape]
    rest = _held((state.step, state.loss_scale, state.halted, counters))
    moments = _held(state.opt_state) - _held(counters)
    return State(parameters, moments, rest, gradients=parameters)


def compile_step(config: RunConfig, mesh: Mesh, state: TrainState) -> Any:
    """The compiled train step (`jax.stages.Compiled`) of a config whose attention is resolved."""
    shape = (config.training.batch_size, config.data.sequence_length + 1)
    place = sharding.sharding(mesh, ("batch", "seq"))
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
    with jax.set_mesh(mesh), warnings.catch_warnings():
        # A process that has trained keeps its programs; those for other machines it cannot read.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
        return jitted_train_step.lower(state, tokens, config=config).compile()


def over_slices(config: RunConfig, topology: Topology) -> RunConfig:
    """The config with as many slices as the topology has."""
    sizes = dataclasses.replace(config.mesh, slices=topology.slices)
    return dataclasses.replace(config, mesh=sizes)


def _held(tree: Any) -> int:
    """Bytes that one device holds of a tree of `ShapeDtypeStruct`s with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _compiled(made: Plan, config: RunConfig, mesh: Mesh, state: TrainState) -> Plan:
    try:
        compiled = compile_step(config, mesh, state)
    except jax.errors.JaxRuntimeError as error:
        refusal = refusal_of(str(error))
        if refusal is None:
            raise
        return dataclasses.replace(made, refusal=refusal)
    stats = compiled.memory_analysis()
    rows = config.training.batch_size // sharding.parts_of_rows(mesh)
    memory = Memory(
        arguments=stats.argument_size_in_bytes,
        batch=rows * (config.data.sequence_length + 1) * jnp.dtype(jnp.int32).itemsize,
        aliased=stats.alias_size_in_bytes,
        program=stats.generated_code_size_in_bytes,
        peak=stats.peak_memory_in_bytes,
    )
    counted = (compiled.cost_analysis() or {}).get("flops")
    found = tuple(collectives(compiled.as_text(), made.topology.slices))
    return dataclasses.replace(made, memory=memory, counted_flops=counted, collectives=found)


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"
_SHORT = (
    re.compile(rf"Used {_SIZE}B? of {_SIZE}B? hbm"),
    re.compile(rf"required for HLO temporaries \({_SIZE}B?\) exceeds available HBM \({_SIZE}B?\)"),
)
_BUFFER = re.compile(
    rf"Size: {_SIZE}B?\n(?:\s+Operator: op_name=\"([^\"]*)\")?.*?Shape: (\S+)", re.DOTALL
)


def refusal_of(message: str) -> Refusal | None:
    """What the compiler says when a program is too large for the chip; None for other errors."""
    found = next((m for pattern in _SHORT if (m := pattern.search(message))), None)
    if found is None:
        return None
    needed, limit = (_bytes(*found.group(i, i + 1)) for i in (1, 3))
    largest = tuple(
        f"{size}{unit} {shape} {(name or '').rpartition('/')[2]}".rstrip()
        for size, unit, name, shape in _BUFFER.findall(message)[:3]
    )
    return Refusal(needed, limit, compiled=True, largest=largest)


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * _UNITS[unit])
