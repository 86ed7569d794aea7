"""What to change in a config that does not fit the chips it was planned for."""

import math
from collections.abc import Iterator

from pythia_jax import sharding
from pythia_jax.training.plan import GIB, Plan
from pythia_jax.training.topologies import Topology, sizes


def advice(plan: Plan) -> list[str]:
    """Changes that take memory off a chip, the cheapest first, each with the flag that makes it.

    Each is one step; whether it is enough, the next plan says. A state that is too large for these
    chips is only helped by cutting it further.
    """
    changes = list(_further_cuts(plan))
    if plan.refusal is None or plan.refusal.compiled:
        changes = [*_within_the_step(plan), *changes]
    return [*changes, *_larger(plan)]


def least_bytes(plan: Plan, parts: int) -> int:
    """Bytes a device cannot do without where state and gradients are cut in so many parts."""
    cut = plan.mesh["fsdp"] * plan.mesh["tensor"]
    return math.ceil(plan.state.least * cut / parts)


def _within_the_step(plan: Plan) -> Iterator[str]:
    training = plan.config.training
    policies = ("none", "dots", "full")
    if training.remat in policies[:2]:
        after = policies[policies.index(training.remat) + 1]
        yield f"--training.remat {after}: keep less of the forward pass, compute it again"
    elif training.remat != "full":
        yield "--training.remat full: keep only what enters each block"
    rows = plan.microbatch
    if rows > 1:
        part = min(n for n in range(2, rows + 1) if rows % n == 0)
        parts = training.gradient_accumulation * part
        yield (
            f"--training.gradient-accumulation {parts}: {rows // part} rows a device at a time, "
            f"not {rows}"
        )


def _further_cuts(plan: Plan) -> Iterator[str]:
    model = plan.config.model
    assert model is not None
    mesh = plan.mesh
    whole = mesh["data"] * mesh["fsdp"]
    enough = least_bytes(plan, whole * mesh["tensor"]) <= plan.limit
    if mesh["data"] > 1 and model.hidden_size % whole == 0 and enough:
        yield f"--mesh.data 1 --mesh.fsdp {whole}: cut the parameters between all chips of a slice"
    if plan.refusal is not None and not plan.refusal.compiled:
        return  # A larger `tensor` takes its chips from `fsdp`, and cuts the state no further.
    tensor = 2 * mesh["tensor"]
    heads = model.num_attention_heads
    if plan.microbatch == 1 and mesh["fsdp"] % 2 == 0 and heads % tensor == 0:
        yield (
            f"--mesh.tensor {tensor} --mesh.fsdp {mesh['fsdp'] // 2}: cut heads and the MLP too, "
            "at the price of more traffic"
        )


def _larger(plan: Plan) -> Iterator[str]:
    model, now = plan.config.model, plan.topology
    assert model is not None
    slices = f" --slices {now.slices}" if now.slices > 1 else ""
    larger = [t for t in sizes(now.chip) if t.chips * now.slices > now.chips]
    for topology in larger:
        parts = topology.devices
        least = least_bytes(plan, parts)
        if least > plan.limit or model.hidden_size % (parts // plan.mesh["tensor"]):
            continue
        yield (
            f"--topology {topology.name}{slices}: {topology.chips} chips a slice; "
            f"state and gradients {least / GIB:.1f} of {plan.limit / GIB:.2f} GiB each, "
            f"cut over all of them{_divisible(plan, topology)}"
        )
        return
    yield f"other chips: no single slice of {now.chip.name} is large enough"


def _divisible(plan: Plan, topology: Topology) -> str:
    """A word on the batch, where the larger slice has more rows in flight than it has rows."""
    training = plan.config.training
    rows = topology.devices * plan.topology.slices // plan.mesh["tensor"]
    microbatch = training.batch_size // training.gradient_accumulation
    if microbatch % rows == 0:
        return ""
    fitting = [
        n for n in range(1, training.batch_size + 1) if training.batch_size % (n * rows) == 0
    ]
    names = " x ".join(sharding.ROWS)
    if not fitting:
        return f" (but {training.batch_size} rows are not divisible by {names} = {rows})"
    return f" (with --training.gradient-accumulation {max(fitting)} or less)"
