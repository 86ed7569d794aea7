"""What an audit concludes from weights' digests and distances: copies, wrong places, gaps.

Training walks: the further apart two checkpoints were made, the further apart their weights are,
for updates have directions in common and hardly ever lead back. So a checkpoint that is labelled
with another's step makes the path through all of them, in the order of their labels, longer than
it was. That is the rule for labels; no absolute distance enters it, and neither does a learning
rate or the spacing of the steps.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Float

OUT_OF_PLACE = 0.05
"""How much of the longest detour that a swap of two labels could make is taken for one. Updates
without a common direction make 0.1 to 0.4 of it, those along a line nearly all; in the right order
it is as much less than nothing."""
UNTOLD = 0.05
"""Share of neighbours whose order cannot be told, from which on none is: a run of plain gradient
descent, too fast for its valley, goes back and forth. With Adam there were none at any rate."""
FAR_OFF = 2.5
"""How often further from both its neighbours than they are from each other a checkpoint is that
none of its run is. Returning as far would take updates that undo each other."""
FEWEST = 3
"""Checkpoints from which on an order can be told."""


def groups(hashes: dict[int, str]) -> list[list[int]]:
    """Steps whose weights are the same, where there are two or more."""
    found: dict[str, list[int]] = defaultdict(list)
    for step in sorted(hashes):
        found[hashes[step]].append(step)
    return [steps for steps in found.values() if len(steps) > 1]


def returns(parts: dict[int, dict[str, str]]) -> list[tuple[int, int, list[str]]]:
    """Parameters that are, bit for bit, those of an earlier step again: (earlier, later, names).

    parts: step → {parameter: digest}. What stays the same from one step to the next, as what is
    frozen does, is no return; neither are copies of all parameters, which `groups` tells.
    """
    steps = sorted(parts)
    again: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name in parts[steps[0]] if steps else ():
        last: dict[str, int] = {}
        for before, step in zip([None, *steps], steps, strict=False):
            digest = parts[step][name]
            if digest in last and before is not None and parts[before][name] != digest:
                again[last[digest], step].append(name)
            last[digest] = step
    return [(*pair, names) for pair, names in again.items() if len(names) < len(parts[pair[0]])]


def original(
    group: Sequence[int], alone: Sequence[int], steps: Sequence[int], distances: np.ndarray
) -> int | None:
    """Which of several steps with the same weights these belong to: the one whose neighbours are
    nearest to them. None where none is clearly nearest.

    alone: steps that are like no other. steps: those that `distances` are between.
    """
    here, costs = steps.index(group[0]), {}
    for step in group:
        near = [s for s in alone if s < step][-1:] + [s for s in alone if s > step][:1]
        if not near:
            return None
        costs[step] = max(distances[here, steps.index(s)] for s in near)
    best, second = sorted(costs.values())[:2]
    return min(costs, key=costs.__getitem__) if 1.5 * best < second else None


def misplaced(
    steps: Sequence[int], distances: Float[np.ndarray, "k k"]
) -> tuple[dict[int, int], int]:
    """Steps whose labels do not fit, each with the one whose weights it seems to hold; and how
    many places there are where the order of neighbours cannot be told.

    Labels are exchanged, two at a time, as long as that shortens the path through all checkpoints;
    what shortens it most comes first. Of fewer than 3 checkpoints, or of all of them the other way
    round, nothing can be told. The order of two neighbours cannot be where the path is about as
    long the other way round, as it is where updates undo each other.
    """
    order = list(range(len(steps)))
    if len(steps) < FEWEST:
        return {}, 0
    for _ in steps:
        gains, shares = _gains(distances[np.ix_(order, order)])
        gains = np.where(shares > OUT_OF_PLACE, gains, 0.0)
        if gains.max() <= 0:
            break
        # Of two that do as well, as one does that turns all round, the nearer.
        best = np.argwhere(gains >= (1 - 1e-6) * gains.max())
        i, j = best[np.argmin(best[:, 1] - best[:, 0])]
        order[i], order[j] = order[j], order[i]
    neighbours = np.diag(_gains(distances[np.ix_(order, order)])[1], 1)
    # `order[place]` is the label of what belongs there.
    seems = {steps[label]: steps[place] for place, label in enumerate(order) if label != place}
    return seems, int(np.sum(neighbours > -OUT_OF_PLACE))


def _gains(distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For i < j, by how much an exchange of the two shortens the path (0 if that leaves one of them
    much worse placed), and which share the two places gain together of the most that they could,
    by the triangle inequality; elsewhere 0."""
    count = len(distances)
    padded = np.zeros((count + 2, count + 2))  # what lies beyond the ends costs nothing
    padded[1:-1, 1:-1] = distances
    at = np.arange(1, count + 1)
    # moved[x, p]: the edges at position p, were x there.
    moved = padded[at][:, at - 1] + padded[at][:, at + 1]
    own = np.diag(moved)
    # Of two neighbours, the edge between them stays, and is in neither's new place.
    near = np.abs(at[:, None] - at[None, :]) == 1
    shared = np.where(near, distances, 0.0)
    first, second = own[:, None] - moved.T - shared, own[None, :] - moved - shared
    edges = (at > 1).astype(int) + (at < count)
    most = (edges[:, None] + edges[None, :] - 2 * near) * distances
    shares = np.divide(first + second, most, out=np.zeros_like(most), where=most > 0)
    # Neither place may be much the worse for it: else what fits nowhere would go to an end.
    worst = np.minimum(first, second) < -0.75 * distances
    gains = np.where(worst, 0.0, first + second)
    upper = at[:, None] < at[None, :]
    return np.where(upper, gains, 0.0), np.where(upper, shares, 0.0)


def strangers(steps: Sequence[int], distances: Float[np.ndarray, "k k"]) -> list[int]:
    """Steps that lie far from both their neighbours, which are near to each other."""
    found = []
    for i in range(1, len(steps) - 1):
        before, after, across = distances[i - 1, i], distances[i, i + 1], distances[i - 1, i + 1]
        if min(before, after) > FAR_OFF * across > 0:
            found.append(steps[i])
    return found


def gaps(steps: Sequence[int]) -> list[int]:
    """Steps that are not there and that the others' regularity asks for.

    The stride is the longest difference that is there three times or more. From the first such on,
    or from a longer one beside it, whole multiples of it between multiples of it are gaps. Where
    the steps have no stride (powers of two), nothing is asked for.
    """
    steps = sorted(steps)
    differences = [b - a for a, b in pairwise(steps)]
    often = [d for d, count in Counter(differences).items() if count >= 3]
    if not often:
        return []
    stride = max(often)
    places = [i for i, d in enumerate(differences) if d == stride]
    first, last = places[0], places[-1] + 1

    def aligned(i: int) -> bool:
        return steps[i] % stride == 0 == steps[i + 1] % stride

    # A stride of 1 is in step with everything: there, what follows may be another schedule.
    while stride > 1 and first > 0 and aligned(first - 1) and steps[first - 1] > 0:
        first -= 1
    while stride > 1 and last < len(differences) and aligned(last):
        last += 1
    offset = steps[places[0]] % stride
    return [
        missing
        for a, b in zip(steps[first:last], steps[first + 1 : last + 1], strict=True)
        if a % stride == offset == b % stride
        for missing in range(a + stride, b, stride)
    ]
