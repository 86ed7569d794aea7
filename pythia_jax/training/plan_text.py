"""A plan as text for a terminal, and as plain values for a file."""

import dataclasses
from typing import Any

from pythia_jax.training.plan import GIB, Plan
from pythia_jax.training.plan_advice import advice


def describe(plan: Plan) -> str:
    """The whole plan, a section after the other."""
    parts = [_setting(plan), _memory(plan)]
    if plan.memory is not None:
        parts += [_traffic(plan), _work(plan)]
    if not plan.fits:
        parts.append("What would help:\n" + "\n".join(f"  {line}" for line in advice(plan)))
    return "\n\n".join(parts)


def to_dict(plan: Plan) -> dict[str, Any]:
    """Plain values, for JSON: sizes in bytes of one device, times in seconds."""
    training = plan.config.training
    return {
        "name": plan.config.name,
        "topology": plan.topology.name,
        "accelerator": plan.topology.accelerator,
        "slices": plan.topology.slices,
        "chips": plan.topology.chips,
        "mesh": dict(plan.mesh),
        "batch_size": training.batch_size,
        "gradient_accumulation": training.gradient_accumulation,
        "remat": training.remat,
        "precision": training.precision,
        "native_precision": plan.native,
        "attention": plan.attention,
        "fits": plan.fits,
        "limit": plan.limit,
        "state": dataclasses.asdict(plan.state),
        "memory": _with_sums(plan),
        "refusal": None if plan.refusal is None else dataclasses.asdict(plan.refusal),
        "advice": [] if plan.fits else advice(plan),
        "collectives": {k: dataclasses.asdict(v) for k, v in plan.traffic.items()},
        "sent_between_slices": plan.sent_between_slices,
        "flops": plan.flops,
        "counted_flops": plan.counted_flops,
        "mfu": plan.mfu,
        "seconds": plan.seconds,
    }


def _with_sums(plan: Plan) -> dict[str, int] | None:
    if plan.memory is None:
        return None
    sums = {"temporaries": plan.memory.temporaries, "needed": plan.memory.needed}
    return {**dataclasses.asdict(plan.memory), **sums}


def _setting(plan: Plan) -> str:
    config, training, chip = plan.config, plan.config.training, plan.topology.chip
    chips = f"{plan.topology.chips} chip{'s' * (plan.topology.chips != 1)}"
    if chip.devices_per_chip > 1:
        chips += f", {plan.topology.devices} devices"
    native = f"native to {chip.name}: {', '.join(chip.native)}"
    at_once = f"{plan.microbatch} row{'s' * (plan.microbatch != 1)} a device at a time"
    rows = f"{training.batch_size} rows of {config.data.sequence_length} tokens"
    parts = training.gradient_accumulation
    if parts > 1:
        rows += f", in {parts} microbatches"
    lines = [
        f"{config.name} on {plan.topology}: {chips}",
        f"  mesh       {' x '.join(f'{axis} {size}' for axis, size in plan.mesh.items())}",
        f"  batch      {rows}; {at_once}",
        f"  precision  {training.precision} ({native})",
        f"  attention  {plan.attention}",
        f"  remat      {training.remat}",
    ]
    if not plan.native:
        lines.append(
            f"  warning: {chip.name} does not multiply {training.precision} as it is; it is "
            "converted or taken apart into several products. --training.precision bfloat16"
        )
    return "\n".join(lines)


def _memory(plan: Plan) -> str:
    state, unit = plan.state, "chip" if plan.topology.chip.devices_per_chip == 1 else "device"
    lines = [
        f"Memory of a {unit}, GiB",
        _row("parameters", state.parameters),
        _row("moments of the optimizer", state.moments),
    ]
    if plan.memory is None:
        return "\n".join([*lines, _row("gradients", state.gradients), *_refused(plan, unit)])
    memory = plan.memory
    padding = memory.arguments - state.kept - memory.batch
    lines.append(_row("batch", memory.batch))
    if padding > max(memory.arguments // 100, GIB // 100):
        lines.append(_row("filling of their tiles", padding))
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    left = (
        f"{plan.excess / GIB:.2f} too much" if plan.excess > 0 else f"{-plan.excess / GIB:.2f} left"
    )
    return "\n".join(
        [
            *lines,
            _row("activations, gradients, temporaries", memory.temporaries),
            _row("peak, of all these", memory.peak),
            _row("program", memory.program),
            _row("limit of the compiler", plan.limit) + f"   {verdict}, {left}",
            f"  {memory.aliased / GIB:.2f} of outputs take the place of the state given up",
        ]
    )


def _refused(plan: Plan, unit: str) -> list[str]:
    refusal = plan.refusal
    assert refusal is not None
    lines = [
        _row("limit of the compiler", refusal.limit),
        f"  DOES NOT FIT: {refusal.needed / GIB:.2f} GiB needed on each {unit}, "
        f"{plan.excess / GIB:.2f} too much",
    ]
    if not refusal.compiled:
        lines.append("  (state and gradients alone; so nothing was compiled)")
    if refusal.largest:
        lines += ["  the largest buffers:", *(f"    {buffer}" for buffer in refusal.largest)]
    return lines


def _traffic(plan: Plan) -> str:
    if not plan.collectives:
        return "Collectives of a step: none"
    rows = [
        f"  {kind:<20}{total.count:>8,}{total.sent / GIB:>10.3f}"
        for kind, total in plan.traffic.items()
    ]
    head = f"  {'Collectives of a step':<20}{'count':>7}{'GiB sent by a device':>22}"
    lines = [head[2:], *rows, f"  {'all':<20}{'':>8}{plan.sent / GIB:>10.3f}"]
    if plan.topology.slices > 1:
        between = plan.sent_between_slices / GIB
        lines.append(f"  {'by those that join slices':<28}{between:>10.3f}")
    if any(0 in collective.loops for collective in plan.collectives):
        lines.append("  some stand in a loop whose length could not be read, and are counted once")
    return "\n".join(lines)


def _work(plan: Plan) -> str:
    lines = [f"Work: {plan.flops:.4g} FLOPs a step (causal attention halved, remat not counted)"]
    if plan.counted_flops:
        lines.append(
            f"  the compiler counts {plan.counted_flops:.3g} on a device; to it a loop runs once "
            "and a kernel is free"
        )
    if plan.seconds is None:
        precision = plan.config.training.precision
        lines.append(f"  no peak is stated for {precision} on this chip, so neither is a time")
        return "\n".join(lines)
    training = plan.config.training
    whole = plan.seconds * training.steps / 3600
    tokens = training.batch_size * plan.config.data.sequence_length / plan.seconds
    return "\n".join(
        [
            *lines,
            f"At {plan.mfu:.0%} MFU, which is assumed and not measured (--mfu):",
            f"  {plan.seconds:.3g} s a step, {tokens:,.0f} tokens/s",
            f"  {training.steps:,} steps: {whole:,.1f} hours, "
            f"{whole * plan.topology.chips:,.0f} chip-hours",
        ]
    )


def _row(name: str, size: int) -> str:
    return f"  {name:<36}{size / GIB:>8.2f}"
