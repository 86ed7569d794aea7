"""The batch viewer shows the tokens of a step, and the documents they are of, to the token."""

import re
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import pytest
from brute_force import KINDS, Run, case, config, corpus, runs, write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pythia_jax.data import Batches, batches
from pythia_jax.data.view import decoded, view

BORDER = re.compile(
    r"── (?:path (\d) · )?document ([\d,]+) · its tokens ([\d,]+):([\d,]+) · at (\d+):(\d+)"
)
ROW = re.compile(r"━━ row (\d+) · sample ([\d,]+)")


def shown(text: str) -> tuple[list[int], list[Run], list[list[int]]]:
    """Row numbers, runs and ids of a view read back from what it prints without colour."""
    rows: list[int] = []
    found: list[Run] = []
    ids: list[list[int]] = []
    for line in click.unstyle(text).split("\n\n", 1)[1].splitlines():
        if match := ROW.fullmatch(line):
            rows.append(int(match[1]))
            ids.append([])
        elif match := BORDER.fullmatch(line):
            numbers = [int((group or "0").replace(",", "")) for group in match.groups()]
            source, document, first, last, column, end = numbers
            assert end - column == last - first
            found.append(Run(len(rows) - 1, column, end - column, source, document, first))
        else:
            ids[-1] += map(int, line.split())
    return rows, found, ids


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_the_documents_behind_them_are_shown_to_the_token(
    kind: str, tmp_path: Path
) -> None:
    seen = case(kind, tmp_path)
    served = batches(seen.config)
    for step, expected in enumerate(seen.batches):
        rows, found, ids = shown(view(served, step))
        assert rows == [0, 1, 2, 3]
        assert found == runs(expected)
        assert ids == [[token.token for token in row] for row in expected]


@pytest.mark.parametrize(
    ("rows", "numbers", "named"),
    [
        ([2], [2], "2"),
        ([3, 0], [3, 0], "3, 0"),
        (slice(1, 3), [1, 2], "1:3"),
        ([0, 1, 3], [0, 1, 3], "0:2, 3"),
        ([-1], [3], "3"),
    ],
)
def test_only_the_rows_asked_for_are_shown(
    rows: slice | list[int], numbers: list[int], named: str, tmp_path: Path
) -> None:
    seen = case("one epoch", tmp_path)
    text = view(batches(seen.config), 5, rows)
    assert f"step 5 of 9 · train_0 · rows {named} of 4" in text
    assert shown(text)[::2] == (
        numbers,
        [[t.token for t in seen.batches[5][n]] for n in numbers],
    )


def test_a_row_or_step_that_is_not_there_is_refused(tmp_path: Path) -> None:
    served = batches(case("one epoch", tmp_path).config)
    with pytest.raises(IndexError, match="a batch has rows 0 to 3"):
        view(served, 0, [4])
    with pytest.raises(IndexError, match="step 9 asked for"):
        view(served, 9)
    with pytest.raises(IndexError, match="no rows asked for; a batch has rows 0 to 3"):
        view(served, 0, slice(4, 9))


def byte_tokenizer() -> Tokenizer:
    """One token a byte, as byte-level BPE without merges; the end of a document at 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def text_batches(folder: Path, texts: list[str], sequence_length: int) -> Batches:
    tokenizer = byte_tokenizer()
    prefix = write(folder / "text", [tokenizer.encode(text).ids for text in texts])
    return batches(config(sequence_length, steps=1, batch_size=1, train=(prefix,)))


def test_text_is_decoded_run_by_run_so_that_characters_of_several_tokens_are_whole(
    tmp_path: Path,
) -> None:
    words = ["naïve", "日本語", "🙂🙃", "plain", "ß", "ẞtraße", "ünï", "ok"]
    served = text_batches(tmp_path, words, sum(len(w.encode()) for w in words) // 2 - 1)
    text = click.unstyle(view(served, 0, [0], byte_tokenizer()))
    lines = text.split("━━ row 0", 1)[1].splitlines()[1:]
    borders, bodies = lines[::2], lines[1::2]
    assert len(bodies) > 2
    for border, body in zip(borders, bodies, strict=True):
        match = BORDER.fullmatch(border)
        assert match is not None
        document, first, last = (int(match[i]) for i in (2, 3, 4))
        assert body == words[document].encode()[first:last].decode(errors="replace")


def test_what_would_not_show_is_shown_as_figures(tmp_path: Path) -> None:
    hidden = "a\nb\tc\r\x1b[31m\x00\x7f\x85\u202e\u200d\ufeff z<|endoftext|>end" + "." * 60
    length = len(byte_tokenizer().encode(hidden).ids) - 1
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(hidden).ids
    served = text_batches(tmp_path, [hidden] * 3, length // 3)
    text = view(served, 0, [0], tokenizer)
    assert not set(click.unstyle(text)) & set("\x1b\r\x00\x7f\x85\u202e\u200d\ufeff")
    assert click.unstyle(decoded(np.array(ids), tokenizer, "green")) == (
        "a↵\nb⇥\tc␍␛[31m␀␡<U+0085><U+202E><U+200D><U+FEFF> z<|endoftext|>end" + "." * 60
    )


def test_ids_the_tokenizer_does_not_know_are_not_lost(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    ids = [*tokenizer.encode("ab").ids, 300, 300, *tokenizer.encode("c").ids]
    prefix = write(tmp_path / "ids", [ids * 4])
    served = batches(config(9, steps=1, batch_size=1, train=(prefix,)))
    assert "ab<300><300>c" in click.unstyle(view(served, 0, [0], tokenizer))


def test_borders_read_without_colour_and_neighbours_differ_with_it(tmp_path: Path) -> None:
    prefix = write(tmp_path / "c", corpus(5, 40, 4))
    text = view(batches(config(30, steps=2, train=(prefix,))), 0, [0])
    colours = re.findall(r"\x1b\[(\d+)m\x1b\[1m── ", text)
    assert len(colours) > 4
    assert all(a != b for a, b in pairwise(colours))
    assert len(BORDER.findall(click.unstyle(text))) == len(colours)
