"""Searching what training saw: every place is found, none is made up, in the order of training."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brute_force import KINDS, Case, case, config, corpus, write
from hypothesis import given
from hypothesis import strategies as st

from pythia_jax.data import Batches, batches
from pythia_jax.data.find import Match, find, positions_of


def places(case: Case, sequence: list[int], start: int = 0, stop: int | None = None) -> list[Match]:
    """Every place, looked for one by one."""
    width = case.config.data.sequence_length + 1
    return [
        Match(step, row, position)
        for step in range(start, len(case.batches) if stop is None else stop)
        for row, sample in enumerate(case.batches[step])
        for position in range(width)
        if [seen.token for seen in sample[position : position + len(sequence)]] == sequence
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 3, 8])
def test_every_place_is_found_and_no_other(kind: str, length: int, tmp_path: Path) -> None:
    seen = case(kind, tmp_path)
    served = batches(seen.config)
    rng = np.random.default_rng(length)
    for _ in range(12):
        sample = seen.batches[rng.integers(9)][rng.integers(4)]
        first = rng.integers(len(sample) - length + 1)
        sequence = [token.token for token in sample[first : first + length]]
        found = list(find(served, sequence))
        assert found == places(seen, sequence) != []


def test_a_sequence_across_documents_is_found_where_they_were_seen_side_by_side(
    tmp_path: Path,
) -> None:
    seen = case("one epoch", tmp_path)
    step, row, border = next(
        (step, row, i)
        for step, rows in enumerate(seen.batches)
        for row, sample in enumerate(rows)
        for i in range(2, 6)
        if sample[i].document != sample[i - 1].document
    )
    sequence = [token.token for token in seen.batches[step][row][border - 2 : border + 2]]
    assert Match(step, row, border - 2) in list(find(batches(seen.config), sequence))


def test_what_no_row_holds_is_not_found(tmp_path: Path) -> None:
    served = batches(case("one epoch", tmp_path).config)
    assert list(find(served, [0])) == []
    assert list(find(served, [1, 0])) == []


@given(st.lists(st.integers(0, 2), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_overlapping_places_are_all_found(sequence: list[int], seed: int) -> None:
    rows = np.random.default_rng(seed).integers(0, 3, (5, 11))
    expected = [
        [row, start]
        for row in range(5)
        for start in range(11)
        if rows[row, start : start + len(sequence)].tolist() == sequence
    ]
    assert positions_of(np.array(sequence), rows).tolist() == expected


def test_steps_are_half_open_and_progress_counts_each(tmp_path: Path) -> None:
    seen = case("several epochs", tmp_path)
    token = seen.batches[4][1][3].token
    done: list[int] = []
    found = list(find(batches(seen.config), [token], 2, 6, done.append))
    assert found == places(seen, [token], 2, 6)
    assert done == [1, 2, 3, 4]


class Watched(Batches):
    """Counts the batches read, and how many at once."""

    read_steps: list[int]

    def read(self, step: int, rows: Any) -> Any:
        if rows == slice(None):
            self.read_steps.append(step)
        return super().read(step, rows)


def watched(settings: Any) -> Watched:
    served = batches(settings)
    copy = object.__new__(Watched)
    copy.__dict__.update(served.__dict__)
    copy.__dict__["read_steps"] = []
    return copy


def test_results_come_before_the_end_and_a_search_broken_off_reads_no_further(
    tmp_path: Path,
) -> None:
    prefix = write(tmp_path / "c", corpus(0, 600, 30))
    served = watched(config(steps=200, train=(prefix,)))
    search = find(served, [served[0][0, 0]])
    served.read_steps.clear()
    assert next(search)[:2] == (0, 0)
    search.close()
    assert len(served.read_steps) < 40
    assert not [t for t in threading.enumerate() if t.name.startswith("find")]


@pytest.mark.parametrize(
    ("sequence", "steps", "message"),
    [
        ([], (0, None), "at least one token id"),
        ([1.5], (0, None), "at least one token id"),
        ([1] * 9, (0, None), "the sequence has 9 tokens, but a row has 8"),
        ([-1], (0, None), "no data holds token id -1"),
        ([1], (3, 3), r"steps 3 to 3 asked for, but train_0 of .* has steps 0 to 9"),
        ([1], (0, 10), r"steps 0 to 10 asked for"),
        ([1], (-1, 4), r"steps -1 to 4 asked for"),
    ],
)
def test_what_cannot_be_searched_is_refused_at_once(
    sequence: list[int], steps: tuple[int, int | None], message: str, tmp_path: Path
) -> None:
    served = batches(case("one epoch", tmp_path).config)
    with pytest.raises(ValueError, match=message):
        find(served, sequence, *steps)
