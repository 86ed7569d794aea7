"""How often training saw a number, two numbers near each other, a number near a unit of time.

Rows are decoded and searched for windows, as in the term-frequency study of the Pythia paper
(section 4.3; code of EleutherAI/pythia, case-studies/term_frequency). A window is

    two numbers, one to three words apart:                     ` 24 times 18`
    a number and a unit of time, up to three words apart:      ` 24 of those hour`, ` hour of 24`

where a number is one to five digits, a word is what white space ends, and the text of a row has a
space put before it. A window begins at every number (or unit) that can begin one; on its way to a
number it takes as many words as it can, to a unit as few. In a window of two numbers, all runs of
digits count, each by itself and with each other; in a window of a unit, each with the unit.
"""

import itertools
import re
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer

from pythia_jax.evaluation.token_bytes import bytes_of_tokens, is_byte_level

UNITS = ("minute", "hour", "day", "week", "month", "year", "decade")

_UNIT = "|".join(UNITS)
# Upstream's word is `(\w|[punctuation])+\s+`. An underscore is both, so a line of them that leads
# nowhere takes time exponential in its length. This is the same set of strings, found in the same
# order; nothing is given back, since what follows a word cannot begin inside it.
_WORD = rf"[\w{re.escape(string.punctuation)}]++\s++"
# Upstream looks ahead from every character; a window begins with a space, which is faster to find.
_NUMBERS = re.compile(rf" (?=(\d{{1,5}} (?:{_WORD}){{1,3}}\d{{1,5}}))")
_UNIT_AFTER = re.compile(rf" (?=(\d{{1,5}} (?:{_WORD}){{0,3}}?(?:{_UNIT})))")
_UNIT_BEFORE = re.compile(rf" (?=((?:{_UNIT}) (?:{_WORD}){{0,3}}?\d{{1,5}}))")
_DIGITS, _ANY_UNIT = re.compile(r"\d{1,5}"), re.compile(_UNIT)

_SHIFT = 17  # a key is first << 17 | second
_LARGEST = 99_999
_ALONE = 100_000  # the second of a number by itself; those of units follow
_MASK = (1 << _SHIFT) - 1

# What transformers did to all decoded text until its version 5, in this order.
_CLEAN_UP = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"))
_CLEAN_UP += ((" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))

Decode = Callable[[NDArray[Any]], str]


@dataclass(frozen=True, eq=False)
class TermCounts:
    """How often each thing was seen in a number of rows.

    keys: sorted, each once, int64. counts: as many, int64.
    """

    keys: NDArray[np.int64]
    counts: NDArray[np.int64]
    rows: int

    def number(self, number: int) -> int:
        """How often a number was seen in a window of numbers."""
        return self._of(number_key(number))

    def pair(self, a: int, b: int) -> int:
        """How often two numbers were seen in one window, in any order."""
        return self._of(pair_key(a, b))

    def with_unit(self, number: int, unit: str) -> int:
        """How often a number was seen in a window of a unit, one of `UNITS`."""
        return self._of(unit_key(number, unit))

    def find(self, keys: ArrayLike) -> NDArray[np.int64]:
        """The counts of keys, 0 for what was not seen."""
        keys = np.asarray(keys, np.int64)
        if not len(self.keys):
            return np.zeros(keys.shape, np.int64)
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[places] == keys, self.counts[places], 0)

    def as_dict(self) -> dict[str, int]:
        """Under upstream's names: `24`, `18-24` (the lesser first), `24-hour`."""

        def name(key: int) -> str:
            first, second = key >> _SHIFT, key & _MASK
            if second == _ALONE:
                return str(first)
            return f"{first}-{UNITS[second - _ALONE - 1] if second > _ALONE else second}"

        return {
            name(key): count
            for key, count in zip(self.keys.tolist(), self.counts.tolist(), strict=True)
        }

    def _of(self, key: int) -> int:
        return int(self.find([key])[0])


def number_key(number: int) -> int:
    """The key of a number by itself in `TermCounts`."""
    return _checked(number) << _SHIFT | _ALONE


def pair_key(a: int, b: int) -> int:
    """The key of two numbers of one window."""
    return min(_checked(a), _checked(b)) << _SHIFT | max(a, b)


def unit_key(number: int, unit: str) -> int:
    """The key of a number and a unit of time of one window."""
    if unit not in UNITS:
        raise ValueError(f"unit {unit!r} is not counted; the units are {', '.join(UNITS)}")
    return _checked(number) << _SHIFT | _ALONE + 1 + UNITS.index(unit)


def _checked(number: int) -> int:
    if not 0 <= number <= _LARGEST:
        raise ValueError(f"{number} is not counted; numbers have one to five digits")
    return number


def merged(parts: Iterable[TermCounts]) -> TermCounts:
    """Counts of all rows of several."""
    parts = list(parts)
    if not parts:
        return _summed(np.zeros(0, np.int64), None, 0)
    keys = np.concatenate([part.keys for part in parts])
    counts = np.concatenate([part.counts for part in parts])
    return _summed(keys, counts, sum(part.rows for part in parts))


def _summed(keys: NDArray[np.int64], counts: NDArray[np.int64] | None, rows: int) -> TermCounts:
    """Counts of keys in any order; each counts once where no counts are given."""
    if not len(keys):
        return TermCounts(keys, np.zeros(0, np.int64), rows)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    begins = np.flatnonzero(np.diff(keys, prepend=keys[0] - 1))
    if counts is None:
        return TermCounts(keys[begins], np.diff(begins, append=len(keys)), rows)
    return TermCounts(keys[begins], np.add.reduceat(counts[order], begins), rows)


def count_texts(texts: Iterable[str], *, clean_up: bool = False) -> TermCounts:
    """Counts of the decoded text of rows.

    clean_up: drop the space before punctuation and contractions first, as transformers did to what
    it decoded when upstream counted.
    """
    keys: list[int] = []
    rows = 0
    for text in texts:
        if clean_up:
            for old, new in _CLEAN_UP:
                text = text.replace(old, new)
        _add_windows(" " + text, keys)
        rows += 1
    return _summed(np.array(keys, np.int64), None, rows)


def _add_windows(text: str, keys: list[int]) -> None:
    for window in _NUMBERS.findall(text):
        numbers = sorted(map(int, _DIGITS.findall(window)))
        keys += [number << _SHIFT | _ALONE for number in numbers]
        keys += [a << _SHIFT | b for a, b in itertools.combinations(numbers, 2)]
    for pattern in (_UNIT_AFTER, _UNIT_BEFORE):
        for window in pattern.findall(text):
            units = [_ALONE + 1 + UNITS.index(unit) for unit in _ANY_UNIT.findall(window)]
            for number in map(int, _DIGITS.findall(window)):
                keys += [number << _SHIFT | unit for unit in units]


def decoder(tokenizer: Tokenizer) -> Decode:
    """What `tokenizer.decode(ids, skip_special_tokens=False)` gives, three times as fast where its
    decoder joins bytes, as GPT-NeoX's does."""
    if not is_byte_level(tokenizer):
        return lambda ids: tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    table = bytes_of_tokens(tokenizer)
    size = len(table)

    def decode(ids: NDArray[Any]) -> str:
        # The library passes over ids that it does not know.
        return b"".join([table[i] for i in ids.tolist() if i < size]).decode("utf-8", "replace")

    return decode
