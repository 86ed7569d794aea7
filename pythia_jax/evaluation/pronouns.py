"""The paper's gender intervention: masculine pronouns of the training data made feminine.

A pronoun is a word between two spaces of the decoded row: he → she, him → her, his → her, and the
same with capitals (Pythia paper, section 4.1; GPT-NeoX's branch new-intervention). Before a comma
or after a line break it stays. As with upstream's `str.replace`, of the same word twice in a row,
" he he ", only the first is one, since they share a space.

`swap_pronouns` encodes anew only the tokens that hold a pronoun, by themselves: all other tokens
keep their ids. Where the new pronoun takes more or fewer tokens, those after it move along in the
row, which is then cut at its width or filled up. With Pythia's tokenizer all are one token, so that
nothing moves; but for "Him" after two spaces or more, which is two.

`swap_pronouns_upstream` does as upstream: the whole text of a row is decoded, without its special
tokens, swapped and encoded again. That changes tokens far from a pronoun too: a character cut at
the row's border becomes U+FFFD, and what was not tokenized as the tokenizer does it by itself is
now. Upstream's last version encodes the text from before the swap, so that no pronoun changes;
that is not repeated here.

Rows without a pronoun come out as they went in, of both. Rows that became shorter are filled up
with id 1, Pythia's <|padding|>, and its loss counts, as upstream.

`swap_pronouns_reverse` goes the other way, she → he and her → his, and undoes nothing: "her" may
have been him or his, of which his is the more frequent.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pythia_jax.evaluation.token_bytes import bytes_of_tokens, is_byte_level

log = logging.getLogger(__name__)

PADDING = 1
"""What fills rows up: <|padding|> of Pythia's tokenizer."""


def _with_capitals(words: Mapping[str, str]) -> Mapping[str, str]:
    return {**words, **{a.capitalize(): b.capitalize() for a, b in words.items()}}


FEMININE = _with_capitals({"he": "she", "him": "her", "his": "her"})
MASCULINE = _with_capitals({"she": "he", "her": "his"})


def swap_pronouns(step: int, rows: NDArray[np.int32], *, tokenizer: Tokenizer) -> NDArray[np.int32]:
    """Masculine pronouns made feminine, all other tokens as they are; a `data.transform`.

    Raises ValueError for a tokenizer that is no byte-level one.
    """
    return _swap(tokenizer, False).in_windows(rows)


def swap_pronouns_reverse(
    step: int, rows: NDArray[np.int32], *, tokenizer: Tokenizer
) -> NDArray[np.int32]:
    """Feminine pronouns made masculine, all other tokens as they are; a `data.transform`.

    Raises ValueError for a tokenizer that is no byte-level one.
    """
    return _swap(tokenizer, True).in_windows(rows)


def swap_pronouns_upstream(
    step: int, rows: NDArray[np.int32], *, tokenizer: Tokenizer
) -> NDArray[np.int32]:
    """Rows with a masculine pronoun decoded, swapped and encoded anew; a `data.transform`.

    Raises ValueError for a tokenizer that is no byte-level one.
    """
    return _swap(tokenizer, False).whole(rows)


@lru_cache(maxsize=4)
def _swap(tokenizer: Tokenizer, reverse: bool) -> "Swap":
    return Swap(tokenizer, MASCULINE if reverse else FEMININE)


class Swap:
    """Words between spaces replaced by others in token rows `[n, seq + 1]`.

    Of a byte-level tokenizer the text of a row is the bytes of its tokens, end to end. So words are
    found without decoding, and what is found is exactly what is in the decoded text: a space or a
    letter of ASCII is never a part of another character.
    """

    def __init__(self, tokenizer: Tokenizer, words: Mapping[str, str]) -> None:
        """Raises ValueError for a tokenizer that is no byte-level one."""
        if not is_byte_level(tokenizer):
            raise ValueError(
                "pronouns are swapped in the rows of byte-level tokenizers, as all of Pythia's "
                f"are, and this one's decoder is {type(tokenizer.decoder).__name__}"
            )
        self.tokenizer, self.words = tokenizer, words
        # The last is for ids that are not the tokenizer's.
        self.bytes_of = [*bytes_of_tokens(tokenizer), b""]
        self._shown = [*bytes_of_tokens(tokenizer, special=False), b""]
        self._sizes = np.array([len(token) for token in self.bytes_of])
        self._patterns = {word: re.compile(f" {word} ".encode()) for word in words}
        first_letter = _holds_first_letter(words)
        self._candidate = np.array([bool(first_letter.search(t)) for t in self.bytes_of])
        self._encoded: dict[bytes, list[int]] = {}
        if tokenizer.id_to_token(PADDING) != "<|padding|>":
            log.warning(
                "rows that a swap makes shorter are filled up with id %d, which of this tokenizer "
                "is %r and not <|padding|>",
                PADDING,
                tokenizer.id_to_token(PADDING),
            )

    def in_windows(self, rows: NDArray[np.int32]) -> NDArray[np.int32]:
        """Rows in which only the tokens that hold a word are others, those after it moved along."""
        made, known = rows.copy(), self._known(rows)
        for number in self.candidates(rows):
            row, ids = rows[number], known[number]
            tokens = [self.bytes_of[token] for token in ids.tolist()]
            found = list(self._found(b"".join(tokens)))
            if found:
                ends = np.cumsum(self._sizes[ids])
                made[number] = fitted(self._with_windows(row, tokens, ends, found), len(row))
        return made

    def whole(self, rows: NDArray[np.int32]) -> NDArray[np.int32]:
        """Rows with a word as upstream makes them, decoded, replaced and encoded anew."""
        made, known = rows.copy(), self._known(rows)
        numbers = [
            number
            for number in self.candidates(rows)
            if any(self._found(b"".join(self._shown[token] for token in known[number].tolist())))
        ]
        texts = [self.tokenizer.decode(rows[number].tolist()) for number in numbers]
        for word, other in self.words.items():
            texts = [text.replace(f" {word} ", f" {other} ") for text in texts]
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for number, encoding in zip(numbers, encoded, strict=True):
            made[number] = fitted(encoding.ids, rows.shape[1])
        return made

    def candidates(self, rows: NDArray[np.int32]) -> NDArray[np.int64]:
        """Numbers of the rows that may hold a word, `[k]`: every one that does, and some others.

        The first letter of a word lies in some token. Those bytes of the word and of the spaces
        around it that lie in that token too are the word's; so it is one of few tokens.
        """
        return np.flatnonzero(self._candidate[self._known(rows)].any(axis=1))

    def _known(self, rows: NDArray[np.int32]) -> NDArray[np.int32]:
        """The same ids, those beyond the tokenizer's made the last, which has no bytes."""
        return np.minimum(rows, np.int32(len(self.bytes_of) - 1))

    def _found(self, text: bytes) -> Iterator[tuple[int, int, str]]:
        """Where words stand, `(begin, end, word)`, spaces left out, in no order."""
        for word, pattern in self._patterns.items():
            for match in pattern.finditer(text):
                yield match.start() + 1, match.end() - 1, word

    def _with_windows(
        self,
        row: NDArray[np.int32],
        tokens: list[bytes],
        ends: NDArray[np.int64],
        found: list[tuple[int, int, str]],
    ) -> list[int]:
        """The tokens of a row, those that hold a word encoded anew."""
        made: list[int] = []
        done, windows = 0, self._windows(tokens, ends, sorted(found))
        for first, last, words in windows:
            begin = int(ends[first - 1]) if first else 0
            text, cut = b"".join(tokens[first:last]), 0
            parts = []
            for start, stop, word in words:
                parts += [text[cut : start - begin], self.words[word].encode()]
                cut = stop - begin
            made += row[done:first].tolist()
            made += self._encode(b"".join([*parts, text[cut:]]))
            done = last
        return made + row[done:].tolist()

    def _windows(
        self, tokens: list[bytes], ends: NDArray[np.int64], found: list[tuple[int, int, str]]
    ) -> list[tuple[int, int, list[tuple[int, int, str]]]]:
        """Runs of tokens that hold words, and the words in each; as few tokens as are text."""
        windows: list[tuple[int, int, list[tuple[int, int, str]]]] = []
        starts, stops = ([place[i] for place in found] for i in (0, 1))
        firsts = np.searchsorted(ends, starts, side="right").tolist()
        lasts = (np.searchsorted(ends, stops, side="left") + 1).tolist()
        for (start, stop, word), first, last in zip(found, firsts, lasts, strict=True):
            while not _is_text(b"".join(tokens[first:last])) and (first or last < len(tokens)):
                first, last = max(first - 1, 0), min(last + 1, len(tokens))
            words = [(start, stop, word)]
            while windows and windows[-1][1] > first:
                before = windows.pop()
                first, last = min(first, before[0]), max(last, before[1])
                words = before[2] + words
            windows.append((first, last, words))
        return windows

    def _encode(self, text: bytes) -> list[int]:
        if text not in self._encoded:
            ids = self.tokenizer.encode(text.decode("utf-8", "replace"), add_special_tokens=False)
            if b"".join(self.bytes_of[token] for token in ids.ids) != text:
                raise ValueError(
                    f"the tokenizer writes {text!r} as {ids.tokens}, which is another text, so it "
                    "cannot be put into a row; swap_pronouns_upstream encodes whole rows"
                )
            self._encoded[text] = ids.ids
        return self._encoded[text]


def fitted(ids: list[int], width: int) -> NDArray[np.int32]:
    """Ids as a row `[width]`: cut at its end, or filled up with `PADDING`."""
    row = np.full(width, PADDING, np.int32)
    row[: len(ids)] = ids[:width]
    return row


def _holds_first_letter(words: Mapping[str, str]) -> re.Pattern[bytes]:
    """Finds tokens that may hold the first letter of " word ", whatever lies in those beside it."""

    def rest(letters: str) -> str:
        if not letters:
            return ""
        return rf"(?:\Z|{letters[0]}{rest(letters[1:])})"

    each = "|".join(f"{word[0]}{rest(f'{word[1:]} ')}" for word in words)
    return re.compile(rf"(?:\A| )(?:{each})".encode())


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
