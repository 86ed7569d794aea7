"""Swapped pronouns: all of them, nothing else, by both readings, whatever the tokenizer."""

import logging
import re
from functools import cache
from typing import Any

import bpe
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from pythia_jax.evaluation.pronouns import (
    FEMININE,
    PADDING,
    Swap,
    swap_pronouns,
    swap_pronouns_reverse,
    swap_pronouns_upstream,
)

WORDS = {"he": "she", "him": "her", "his": "her", "He": "She", "Him": "Her", "His": "Her"}
FILLING = (
    "the nurse doctor said that this history, whether she or her he. him\nhis\t(he) hers herself "
    "chief He's they theme Ünïcödé 日本語 🙂 hi h H e is im  double    wide 1234 heh hehe"
)
WIDTH = 65


def text(rng: np.random.Generator, words: int, share: float) -> str:
    """Words at random, of which so many are pronouns."""
    chosen = [
        str(rng.choice([*WORDS])) if rng.random() < share else str(rng.choice(FILLING.split(" ")))
        for _ in range(words)
    ]
    return " ".join(chosen)


@pytest.fixture(scope="module", params=["small", "spanning", "pythias"])
def tokenizer(request: Any) -> Tokenizer:
    rng = np.random.default_rng(7)
    if request.param == "pythias":
        return bpe.pythias()
    texts = [text(rng, 30, 0.1) for _ in range(50)]
    if request.param == "spanning":
        return bpe.small(texts, 900, spanning=True)
    return bpe.small(texts)


def rows_of(tokenizer: Tokenizer, count: int, share: float, seed: int = 0) -> np.ndarray:
    """Rows cut out of texts anywhere, so in the middle of words and characters too."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ids = tokenizer.encode(text(rng, 120, share)).ids
        begin = rng.integers(0, len(ids) - WIDTH)
        rows.append(ids[begin : begin + WIDTH])
    return np.array(rows, np.int32)


@cache
def by_text(tokenizer: Tokenizer) -> dict[str, int]:
    return {tokenizer.decode([i]): i for i in range(tokenizer.get_vocab_size())}


def split_anyhow(tokenizer: Tokenizer, content: str, rng: np.random.Generator) -> list[int]:
    """The ids of a text cut into any tokens at all, not into those that the tokenizer chooses."""
    vocabulary, ids, left = by_text(tokenizer), [], content
    while left:
        sizes = [n for n in range(1, 8) if left[:n] in vocabulary and len(left) >= n]
        size = int(rng.choice(sizes))
        ids.append(vocabulary[left[:size]])
        left = left[size:]
    return ids


def decoded(tokenizer: Tokenizer, row: np.ndarray) -> str:
    return tokenizer.decode(row.tolist(), skip_special_tokens=False)


def replaced(content: str) -> str:
    for word, other in WORDS.items():
        content = content.replace(f" {word} ", f" {other} ")
    return content


def upstream(tokenizer: Tokenizer, rows: np.ndarray) -> np.ndarray:
    """What upstream's batch function does, its last version's slip left out, row by row."""
    made = []
    for row in rows:
        before = tokenizer.decode(row.tolist())
        after = replaced(before)
        if after == before:
            made.append(row.tolist())
            continue
        ids = tokenizer.encode(after).ids
        made.append((ids + [1] * len(row))[: len(row)])
    return np.array(made, np.int32)


def test_the_words_are_upstreams() -> None:
    assert dict(FEMININE) == WORDS


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3])
def test_exactly_the_rows_with_a_pronoun_change_and_read_as_replaced(tokenizer, share) -> None:
    rows = rows_of(tokenizer, 60, share)
    made = swap_pronouns(0, rows.copy(), tokenizer=tokenizer)
    texts = [decoded(tokenizer, row) for row in rows]
    wanted = [replaced(content) for content in texts]
    changed = np.any(made != rows, axis=1)
    assert changed.tolist() == [a != b for a, b in zip(texts, wanted, strict=True)]
    assert share == 0.01 or changed.any() == (share > 0)
    for row, content in zip(made, wanted, strict=True):
        kept = row[row != PADDING]
        found = decoded(tokenizer, kept)
        # A longer row was cut, perhaps within a character.
        assert content.startswith(found.rstrip("�")) and len(kept) <= WIDTH
        assert len(kept) == WIDTH or found == content


@pytest.mark.parametrize("seed", range(4))
def test_only_tokens_that_hold_a_pronoun_change(tokenizer, seed) -> None:
    """Against places in the text, which is of single bytes here, as one token after another has
    it; whatever tokens a text is cut into."""
    rng = np.random.default_rng(seed)
    content = re.sub(r"[^ -~\n\t]", "x", text(rng, 40, 0.25))
    ids = split_anyhow(tokenizer, content, rng)
    room = [PADDING] * 40  # so that nothing is cut
    (made,) = swap_pronouns(0, np.array([ids + room], np.int32), tokenizer=tokenizer)
    ends = np.cumsum([len(tokenizer.decode([i])) for i in ids])
    spots = [
        range(match.start() + 1, match.end() - 1)
        for word in WORDS
        for match in re.finditer(f" {word} ", content)
    ]
    assert spots
    hit = [
        any(spot.start < end and begin < spot.stop for spot in spots)
        for begin, end in zip([0, *ends[:-1]], ends, strict=True)
    ]
    # Each run of tokens that were not hit stands there as it was, in order; between two, and only
    # there, lies what was encoded anew.
    pattern = "".join(
        "N" if touched else f",{token}" for token, touched in zip(ids, hit, strict=True)
    )
    pattern = re.sub("N+", r"(?:,\\d+)+?", pattern)
    as_text = "".join(f",{token}" for token in made[made != PADDING])
    assert re.fullmatch(pattern, as_text)
    assert decoded(tokenizer, made[made != PADDING]) == replaced(content)


def test_a_row_without_a_pronoun_keeps_every_bit(tokenizer) -> None:
    rng = np.random.default_rng(3)
    rows = rng.integers(0, tokenizer.get_vocab_size() + 20, (300, WIDTH)).astype(np.int32)
    for function in (swap_pronouns, swap_pronouns_upstream):
        made = function(0, rows.copy(), tokenizer=tokenizer)
        for before, after in zip(rows, made, strict=True):
            content = decoded(tokenizer, before)
            if replaced(content) == content:
                np.testing.assert_array_equal(before, after)


def test_no_row_with_a_pronoun_is_passed_over_without_a_look(tokenizer) -> None:
    rng = np.random.default_rng(5)
    swap = Swap(tokenizer, FEMININE)
    for _ in range(150):
        content = re.sub(r"[^ -~\n\t]", "x", text(rng, 12, 0.1))
        row = np.array([split_anyhow(tokenizer, content, rng)], np.int32)
        if replaced(content) != content:
            assert swap.candidates(row).tolist() == [0]
    # And most of what cannot hold one is.
    plain = np.array([tokenizer.encode("no one was there at all, said Mary").ids], np.int32)
    assert swap.candidates(plain).size == 0


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_whole_rows_encoded_anew_are_upstreams(tokenizer, share) -> None:
    rows = rows_of(tokenizer, 60, share, seed=1)
    rows[::7, 10] = 0  # special tokens, which upstream loses
    made = swap_pronouns_upstream(0, rows.copy(), tokenizer=tokenizer)
    np.testing.assert_array_equal(made, upstream(tokenizer, rows))


def test_rows_are_cut_or_filled_up_where_lengths_change() -> None:
    tokenizer = bpe.small(["him"] * 20, size=262)  # " him" is few tokens, " her" more
    spare = len(tokenizer.encode(" her").ids) - len(tokenizer.encode(" him").ids)
    assert spare > 0
    ids = tokenizer.encode("saw him go").ids
    row = np.array([ids], np.int32)
    whole = tokenizer.encode("saw her go").ids
    for function in (swap_pronouns, swap_pronouns_upstream):
        made = function(0, row.copy(), tokenizer=tokenizer)
        assert made.tolist() == [whole[: len(ids)]]
    other = bpe.small(["her"] * 20, size=262)
    ids = other.encode("saw him go").ids
    whole = other.encode("saw her go").ids
    made = swap_pronouns(0, np.array([ids], np.int32), tokenizer=other)
    assert made.tolist() == [whole + [PADDING] * (len(ids) - len(whole))]


def test_a_special_token_stays_in_its_place(tokenizer) -> None:
    ids = [*tokenizer.encode("and he went").ids, 0, *tokenizer.encode("so his own").ids]
    (made,) = swap_pronouns(0, np.array([ids], np.int32), tokenizer=tokenizer)
    content = decoded(tokenizer, np.array([*made, PADDING]))
    assert content.startswith("and she went<|endoftext|>so her ow")


def test_of_pythias_tokenizer_all_but_one_are_one_token_before_and_after() -> None:
    tokenizer = bpe.pythias()
    rng = np.random.default_rng(2)
    content = text(rng, 400, 0.2)
    row = np.array([tokenizer.encode(content).ids], np.int32)
    made = swap_pronouns(0, row, tokenizer=tokenizer)
    kept = made[made != PADDING].tolist()
    assert kept == tokenizer.encode(replaced(content)).ids
    # After a single space, and after more: those are a token of their own, which takes the space.
    for before in (" ", ""):
        for word, other in WORDS.items():
            sizes = [len(tokenizer.encode(before + w).ids) for w in (word, other)]
            assert sizes == ([2, 1] if (before, word) == ("", "Him") else [1, 1])


def test_the_reverse_reads_her_as_his(tokenizer) -> None:
    ids = [*tokenizer.encode("then she saw her dog , She ran").ids, *[PADDING] * 5]
    (made,) = swap_pronouns_reverse(0, np.array([ids], np.int32), tokenizer=tokenizer)
    content = tokenizer.decode(made.tolist())
    assert content == "then he saw his dog , He ran"


def test_rows_swapped_one_by_one_are_those_swapped_together(tokenizer) -> None:
    rows = rows_of(tokenizer, 9, 0.2, seed=4)
    for function in (swap_pronouns, swap_pronouns_upstream, swap_pronouns_reverse):
        together = function(3, rows.copy(), tokenizer=tokenizer)
        for i in range(len(rows)):
            alone = function(8, rows[i : i + 1].copy(), tokenizer=tokenizer)
            np.testing.assert_array_equal(alone[0], together[i])


def test_another_kind_of_tokenizer_is_refused() -> None:
    words = Tokenizer(models.WordLevel({"he": 0, "she": 1}, "he"))
    with pytest.raises(ValueError, match="byte-level"):
        swap_pronouns(0, np.zeros((1, 4), np.int32), tokenizer=words)


def test_a_tokenizer_whose_id_1_is_no_padding_is_told_of(caplog) -> None:
    tokenizer = Tokenizer.from_str(bpe.small(["him"]).to_str().replace("<|padding|>", "<|other|>"))
    with caplog.at_level(logging.WARNING):
        swap_pronouns(0, np.zeros((1, 4), np.int32), tokenizer=tokenizer)
    assert "filled up with id 1, which of this tokenizer is '<|other|>'" in caplog.text
