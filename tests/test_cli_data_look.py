"""`data view`, `data find` and `data document` as their users type them."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import click
import command_line
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pythia_jax import configs, data

TEXTS = [f"document {i}: " + "to be or not to be, " * (i % 5) + "élan." for i in range(40)]
SMALL = ("--data.sequence-length", 40, "--training.steps", 12, "--training.batch-size", 6)


run = partial(command_line.run, "data")
refused = partial(command_line.refused, "data")


def output(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.fixture
def prefix(tmp_path: Path, tokenizer: Path) -> Path:
    data.tokenize_texts(TEXTS, tmp_path / "corpus", tokenizer)
    return tmp_path / "corpus"


@pytest.fixture
def config(tmp_path: Path, prefix: Path, tokenizer: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"data: {{train: [{prefix}], validation: [{prefix}], sequence_length: 40}}\n"
        f"tokenizer: {tokenizer}\ntraining: {{steps: 12, batch_size: 6}}\n"
        "evaluation: {every: 5, steps: 2}\n"
    )
    return path


def served(config: Path, split: str = "train") -> data.Batches:
    return data.batches(configs.load(config), split)


def ids_shown(text: str) -> list[int]:
    lines = [line for line in text.splitlines()[3:] if line and line[0].isdigit()]
    return [int(word) for line in lines for word in line.split()]


def test_view_shows_the_first_rows_of_the_step_and_says_so(config: Path) -> None:
    result = run("view", config, "--step", 7)
    assert ids_shown(result.stdout) == served(config)[7][:4].ravel().tolist()
    assert "step 7 of 12 · train_0 · rows 0:4 of 6" in result.stdout
    assert "Rows 4 to 5 are not shown" in result.stderr
    assert "\x1b" not in result.output  # not a terminal


@pytest.mark.parametrize(
    ("flags", "rows"),
    [
        (["--row", 5], [5]),
        (["--row", 5, "--row", 1], [5, 1]),
        (["--rows", "2:4"], [2, 3]),
        (["--rows", ":"], list(range(6))),
        (["--rows", "4:"], [4, 5]),
    ],
)
def test_view_shows_the_rows_asked_for(config: Path, flags: list[object], rows: list[int]) -> None:
    result = run("view", config, "--step", 7, *flags)
    assert ids_shown(result.stdout) == served(config)[7][rows].ravel().tolist()
    assert "not shown" not in result.output


def test_view_takes_splits_prefixes_and_dotted_flags(config: Path, prefix: Path) -> None:
    validation = output("view", config, "--step", 3, "--split", "validation", "--row", 0)
    assert ids_shown(validation) == served(config, "validation")[3][0].tolist()
    bare = output("view", prefix, *SMALL, "--step", 7, "--row", 2)
    assert ids_shown(bare) == served(config)[7][2].tolist()


def test_view_shows_text_by_the_tokenizer_of_the_config_or_the_flag(
    config: Path, prefix: Path, tokenizer: Path
) -> None:
    text = output("view", config, "--step", 7, "--text")
    other = output("view", prefix, *SMALL, "--step", 7, "--text", "--tokenizer", tokenizer)
    assert text == other
    lines = click.unstyle(text).splitlines()
    known = "".join(TEXTS)
    assert all(line.strip("�") in known for line in lines[5:] if line and line[0] not in "━─")
    assert "to be or not to be" in text


def places(config: Path, sequence: list[int]) -> list[dict[str, int]]:
    rows = [batch.tolist() for batch in served(config)]
    return [
        {"step": step, "row": row, "position": position}
        for step in range(12)
        for row in range(6)
        for position in range(41)
        if rows[step][row][position : position + len(sequence)] == sequence
    ]


def test_find_prints_every_place_and_writes_them_as_json_lines(
    config: Path, tokenizer: Path, tmp_path: Path
) -> None:
    ids = Tokenizer.from_file(str(tokenizer)).encode(" élan").ids
    expected = places(config, ids)
    assert expected
    out = tmp_path / "found.jsonl"
    result = run("find", config, "--text", " élan", "--out", out)
    assert [json.loads(line) for line in out.read_text().splitlines()] == expected
    printed = [line for line in result.stdout.splitlines() if line.startswith("step ")]
    assert printed == ["step {step} row {row} position {position}".format(**p) for p in expected]
    assert f"{len(expected)} places in steps 0 to 12 (not included) of train_0" in result.stdout
    assert " ".join(map(str, ids)) in result.stderr and "12/12" in result.stderr
    by_ids = output("find", config, "--tokens", ",".join(map(str, ids)))
    assert by_ids == result.stdout


def test_find_takes_steps_and_says_that_text_may_be_tokens_otherwise(config: Path) -> None:
    result = run("find", config, "--text", "élan", "--start", 3, "--stop", 5)
    steps = {int(line.split()[1]) for line in result.stdout.splitlines()[:-1]}
    assert steps <= {3, 4}
    assert "search for ' élan' too" in result.stderr
    assert "too." not in run("find", config, "--text", " élan").stderr


def test_a_search_that_fails_leaves_what_it_found_under_another_name(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = data.Batches.read

    def broken(self: data.Batches, step: int, rows: Any) -> Any:
        if step == 9:
            raise OSError("the disk went away")
        return whole(self, step, rows)

    monkeypatch.setattr(data.Batches, "read", broken)
    out = tmp_path / "found.jsonl"
    assert "went away" in refused("find", config, "--text", " be", "--out", out)
    assert not out.exists()
    found = [json.loads(line) for line in Path(f"{out}.partial").read_text().splitlines()]
    assert found and all(place["step"] < 9 for place in found)


def test_document_names_every_row_that_holds_it_and_the_epochs(config: Path) -> None:
    text = output("document", config, 14)
    rows = served(config)
    lines = text.splitlines()
    for step in range(12):
        pieces = rows.pieces(step)
        for i in np.flatnonzero(pieces.document == 14):
            offset, column, length = pieces.offset[i], pieces.column[i], pieces.length[i]
            assert (
                f"step {step} row {pieces.row[i]} · its tokens {offset}:{offset + length} "
                f"at {column}:{column + length}" in lines
            )
            lines.remove(
                f"step {step} row {pieces.row[i]} · its tokens {offset}:{offset + length} "
                f"at {column}:{column + length}"
            )
    assert len(lines) == 1
    assert lines[0].startswith("document 14 of ") and lines[0].endswith(" 2 epochs")


def test_preshuffled_rows_are_viewed_searched_and_traced(
    config: Path, prefix: Path, tmp_path: Path
) -> None:
    rows = np.concatenate(list(served(config))).astype("<u2")
    rows.tofile(tmp_path / "rows.bin")
    flags = ("--data.order", "preshuffled", *SMALL)
    untraced = output("view", tmp_path / "rows", *flags, "--step", 7)
    assert "documents  not known" in untraced and "set data.documents" in untraced
    assert ids_shown(untraced) == served(config)[7][:4].ravel().tolist()
    assert "set data.documents" in refused("document", tmp_path / "rows", 14, *flags)
    prefix.with_suffix(".bin").rename(tmp_path / "away.bin")  # the index alone is left
    traced = output(
        "view", tmp_path / "rows", *flags, "--step", 7, "--data.documents", prefix
    ).split("\n\n", 1)[1]
    seen = output("document", tmp_path / "rows", 14, *flags, "--data.documents", prefix)
    (tmp_path / "away.bin").rename(prefix.with_suffix(".bin"))
    assert traced == output("view", config, "--step", 7).split("\n\n", 1)[1]
    assert seen.splitlines()[:-1] == output("document", config, 14).splitlines()[:-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["view", "CONFIG", "--step", 12], "step 12 asked for, but it has 12 steps"),
        (["view", "CONFIG", "--step", 0, "--row", 6], "a batch has rows 0 to 5"),
        (["view", "CONFIG", "--step", 0, "--row", 1, "--rows", "0:2"], "one of them"),
        (["view", "CONFIG", "--step", 0, "--rows", "3"], "--rows 0:16"),
        (["view", "PREFIX", *SMALL, "--step", 0, "--text"], "give --tokenizer"),
        (["view", "CONFIG", "--step", 0, "--text", "--tokenizer", "gone"], "gone: no such file"),
        (["view", "CONFIG", "--step", 0, "--split", "test"], "data.test names no dataset"),
        (["view", "gone", "--step", 0], "gone.idx: no such file"),
        (["find", "CONFIG"], "Give --text or --tokens"),
        (["find", "CONFIG", "--text", "a", "--tokens", "1"], "one of them"),
        (["find", "CONFIG", "--tokens", "1,x"], "give ids, --tokens 510,3158,8516"),
        (["find", "CONFIG", "--text", ""], "at least one token id"),
        (["find", "CONFIG", "--text", "x" * 42], "has 42 tokens, but a row has 41"),
        (["find", "CONFIG", "--tokens", "1", "--stop", 13], "steps 0 to 13 asked for"),
        (["find", "PREFIX", *SMALL, "--text", "a"], "give --tokenizer"),
        (["document", "CONFIG", 40], "document 40 asked for, but there are 40"),
        (["document", "CONFIG", 3, "--source", 1], "path 1 asked for, but there are 1"),
    ],
)
def test_bad_input_is_one_clear_line(
    config: Path, prefix: Path, arguments: list[object], message: str
) -> None:
    named = {"CONFIG": config, "PREFIX": prefix}
    assert message in refused(*[named.get(str(a), a) for a in arguments])
