"""Collectives read off optimised HLO: how many, how large, how often."""

import math

import pytest

from pythia_jax.training.collectives import Collective, Total, collectives, totals

HEADER = "HloModule jit_f, is_scheduled=true, num_partitions=8\n\n"


def entry(*lines: str) -> str:
    body = "".join(f"  {line}\n" for line in lines)
    return f"ENTRY %main (p: f32[8,4]) -> f32[] {{\n  %p = f32[8,4]{{1,0}} parameter(0)\n{body}}}\n"


def only(text: str) -> Collective:
    (found,) = collectives(HEADER + text)
    return found


@pytest.mark.parametrize(
    ("operation", "sent", "elements"),
    [
        # 128 bytes on each of 4: what a ring sends of each kind.
        ("all-gather(%p), dimensions={0}", 128 * 3, 32 * 4),
        ("reduce-scatter(%p), dimensions={0}, to_apply=%add", 128 * 3 / 4, 32),
        ("all-reduce(%p), to_apply=%add", 2 * 128 * 3 / 4, 32),
        ("all-to-all(%p)", 128 * 3 / 4, 32),
        ("collective-permute(%p), source_target_pairs={{0,1}}", 128, 32),
    ],
)
@pytest.mark.parametrize(
    "groups",
    [
        "replica_groups={{0,1,2,3},{4,5,6,7}}",
        "replica_groups=[2,4]<=[8]",
        "replica_groups=[2,4]<=[4,2]T(1,0)",
        "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}",
        "replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}",
    ],
)
def test_bytes_are_those_of_a_ring(operation: str, sent: float, elements: int, groups: str) -> None:
    found = only(entry(f"ROOT %c = f32[8,4]{{1,0}} {operation}, channel_id=1, {groups}"))
    assert (found.sent, found.elements) == (sent, elements)
    assert (found.times, found.loops) == (1, ())


@pytest.mark.parametrize(
    ("groups", "between"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", False),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", True),
        ("replica_groups=[4,2]<=[8]", False),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", True),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", False),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", True),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}", False),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(1)2}", True),
        ("replica_groups={}", True),
    ],
)
def test_what_joins_slices_is_told_apart(groups: str, between: bool) -> None:
    text = entry(f"ROOT %c = f32[8,4]{{1,0}} all-reduce(%p), {groups}")
    assert [c.between_slices for c in collectives(HEADER + text, slices=2)] == [between]
    assert [c.between_slices for c in collectives(HEADER + text)] == [False]


@pytest.mark.parametrize(("pairs", "between"), [("{0,1},{1,0}", False), ("{3,4},{4,3}", True)])
def test_a_permutation_joins_slices_if_a_pair_does(pairs: str, between: bool) -> None:
    text = entry(f"ROOT %c = f32[8,4] collective-permute(%p), source_target_pairs={{{pairs}}}")
    (found,) = collectives(HEADER + text, slices=2)
    assert found.between_slices is between


def test_a_group_left_empty_is_all_devices() -> None:
    assert only(entry("ROOT %c = f32[8,4]{1,0} all-reduce(%p), replica_groups={}")).group == 8


def test_a_collective_among_one_device_moves_nothing() -> None:
    alone = "replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}"
    assert not collectives(HEADER + entry(f"ROOT %c = f32[8,4]{{1,0}} all-reduce(%p), {alone}"))


@pytest.mark.parametrize(
    ("type_", "size"), [("bf16[8,4]", 64), ("f8e4m3fn[8,4]", 32), ("pred[8,4]", 32), ("f32[]", 4)]
)
def test_bytes_follow_the_type(type_: str, size: int) -> None:
    text = entry(
        f"%q = {type_}{{1,0:T(8,128)(2,1)S(1)}} custom-call()",
        f"ROOT %c = {type_}{{1,0}} all-gather(%q), replica_groups=[4,2]<=[8]",
    )
    assert only(text).sent == size


def test_start_and_done_are_one() -> None:
    text = entry(
        "%s = (f32[8,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%p), replica_groups=[4,2]<=[8]",
        "ROOT %d = f32[16,4]{1,0} all-gather-done(%s)",
    )
    assert (only(text).kind, only(text).sent) == ("all-gather", 128)


def fusion(name: str, chain: str = ', frontend_attributes={chain_id="2"}') -> str:
    return (
        f"%{name} (q: f32[8,4]) -> f32[16,4] {{\n  %q.{name} = f32[8,4]{{1,0}} parameter(0)\n"
        f"  ROOT %g.{name} = f32[16,4]{{1,0}} all-gather(%q.{name}), channel_id=1, "
        f"replica_groups=[4,2]<=[8]{chain}\n}}\n\n"
    )


def test_steps_of_one_asynchronous_collective_are_one_even_in_a_loop() -> None:
    # As XLA for TPUs writes it: begun before a loop, carried on in it, finished after it.
    text = (
        fusion("begin")
        + fusion("go_on")
        + fusion("finish")
        + loop("%step = f32[16,4]{1,0} fusion(%x), kind=kOutput, calls=%go_on", bound=6)
        + entry(
            "%async-collective-start.2 = f32[16,4]{1,0} fusion(%p), kind=kCustom, calls=%begin",
            *RUN,
            "ROOT %async-collective-done.2 = f32[16,4]{1,0} fusion(%w), calls=%finish",
        )
    )
    assert (only(text).times, only(text).loops) == (1, ())


def test_a_fused_collective_that_is_no_chain_counts() -> None:
    text = fusion("inside", chain="") + entry("ROOT %f = f32[16,4]{1,0} fusion(%p), calls=%inside")
    assert only(text).kind == "all-gather"


def loop(*body: str, bound: int, step: int = 1, compare: str = "direction=LT") -> str:
    """A loop as XLA for TPUs leaves it: it counts, and does not say how far."""
    lines = "".join(f"  {line}\n" for line in body)
    return (
        "%cond (c: (s32[], f32[8,4], s32[])) -> pred[] {\n"
        f"  %n = s32[]{{:T(128)}} constant({bound})\n"
        "  %c = (s32[]{:T(128)}, f32[8,4]{1,0}, s32[]) parameter(0)\n"
        "  %ci = s32[]{:T(128)} get-tuple-element(%c), index=0\n"
        f"  ROOT %less = pred[]{{:T(512)}} compare(%ci, %n), {compare}\n}}\n\n"
        "%body (b: (s32[], f32[8,4], s32[])) -> (s32[], f32[8,4], s32[]) {\n"
        "  %b = (s32[]{:T(128)}, f32[8,4]{1,0}, s32[]) parameter(0)\n"
        "  %i = s32[]{:T(128)} get-tuple-element(%b), index=0\n"
        "  %x = f32[8,4]{1,0} get-tuple-element(%b), index=1\n"
        "  %carried = s32[]{:T(128)} get-tuple-element(%b), index=2\n"
        f"{lines}"
        f"  %by = s32[]{{:T(128)}} constant({step})\n"
        "  %next = s32[]{:T(128)} add(%i, %by)\n"
        "  ROOT %out = (s32[]{:T(128)}, f32[8,4]{1,0}, s32[]) tuple(%next, %x, %carried)\n}\n\n"
    )


REDUCE = "%r = f32[8,4]{1,0} all-reduce(%x), replica_groups=[4,2]<=[8]"
RUN = (
    "%zero = s32[]{:T(128)} constant(0)",
    "%first = s32[]{:T(128)} copy(%zero)",
    "%t = (s32[]{:T(128)}, f32[8,4]{1,0}, s32[]) tuple(%first, %p, %zero)",
    "%w = (s32[]{:T(128)}, f32[8,4]{1,0}, s32[]) while(%t), condition=%cond, body=%body",
)


@pytest.mark.parametrize(("bound", "step", "runs"), [(6, 1, 6), (8, 2, 4), (7, 2, 4)])
def test_what_stands_in_a_loop_runs_as_often_as_its_counter_says(
    bound: int, step: int, runs: int
) -> None:
    found = only(loop(REDUCE, bound=bound, step=step) + entry(*RUN))
    assert (found.times, found.loops) == (runs, (runs,))


def test_the_compilers_own_word_on_a_loop_goes_first() -> None:
    known = RUN[-1] + ', backend_config={"known_trip_count":{"n":"5"}}'
    assert only(loop(REDUCE, bound=6) + entry(*RUN[:-1], known)).times == 5


def test_a_loop_of_unknown_length_is_told_as_such_and_counted_once() -> None:
    found = only(loop(REDUCE, bound=6, compare="direction=NE") + entry(*RUN))
    assert (found.times, found.loops) == (1, (0,))


def test_totals_are_by_kind() -> None:
    def some(kind: str, *loops: int) -> Collective:
        return Collective(kind, math.prod(loops), 10.0, 4, 2, loops, "")

    found = [some("all-reduce"), some("all-gather", 3, 2), some("all-gather")]
    assert totals(found) == {"all-gather": Total(7, 70), "all-reduce": Total(1, 10)}
