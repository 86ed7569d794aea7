"""`pythia-jax data tokenize` and `data batches` as their users type them."""

import gzip
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard
from command_line import refused, run
from tokenizers import Tokenizer, models, pre_tokenizers

from pythia_jax import configs, data

TEXTS = [f"the quick brown fox jumps over dog {'abcdefgh'[i]}" for i in range(8)]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """One token a letter, the end of a document at 0."""
    vocab = {"<|endoftext|>": 0, **{c: i + 1 for i, c in enumerate("abcdefghijklmnopqrstuvwxyz ")}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """The eight texts, two each in files of every kind; read in this order."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    lines = [json.dumps({"text": t, "body": t[::-1]}).encode() + b"\n" for t in TEXTS]
    (folder / "a.jsonl").write_bytes(b"".join(lines[:2]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[2:4])))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(b"".join(lines[4:6])))
    (folder / "d.txt").write_text(TEXTS[6])
    (folder / "e.txt.gz").write_bytes(gzip.compress(TEXTS[7].encode()))
    return folder


@pytest.fixture
def config(tmp_path: Path, inputs: Path, tokenizer: Path) -> Path:
    """Only the sections that data needs."""
    made = run("data", "tokenize", inputs, "--out", tmp_path / "corpus", "--tokenizer", tokenizer)
    assert made.exit_code == 0, made.output
    path = tmp_path / "run.yaml"
    path.write_text(f"""
data: {{train: [{tmp_path}/corpus], validation: [{tmp_path}/corpus], sequence_length: 8}}
training: {{steps: 6, batch_size: 4}}
evaluation: {{every: 3, steps: 1}}
""")
    return path


def test_every_kind_of_input_is_tokenized_in_order(
    tmp_path: Path, inputs: Path, tokenizer: Path
) -> None:
    made = run("data", "tokenize", inputs, "--out", tmp_path / "out", "--tokenizer", tokenizer)
    assert made.exit_code == 0, made.output
    assert "8 documents" in made.output and "MB/s of text" in made.output
    files = sorted(inputs.iterdir())
    again = run("data", "tokenize", *files, "--out", tmp_path / "again", "--tokenizer",
                tmp_path, "--workers", 1)  # fmt: skip
    assert again.exit_code == 0, again.output
    for suffix in (".bin", ".idx"):
        ours = (tmp_path / "out").with_suffix(suffix).read_bytes()
        assert (tmp_path / "again").with_suffix(suffix).read_bytes() == ours
    read, written = Tokenizer.from_file(str(tokenizer)), data.open(tmp_path / "out")
    assert [written[i].tolist() for i in range(8)] == [read.encode(t).ids for t in TEXTS]


def test_text_key_and_append_eod(tmp_path: Path, inputs: Path, tokenizer: Path) -> None:
    made = run("data", "tokenize", inputs / "c.jsonl.zst", "--out", tmp_path / "out",
               "--tokenizer", tokenizer, "--text-key", "body", "--append-eod")  # fmt: skip
    assert made.exit_code == 0, made.output
    read, written = Tokenizer.from_file(str(tokenizer)), data.open(tmp_path / "out")
    assert [written[i].tolist() for i in range(2)] == [
        [*read.encode(text[::-1]).ids, 0] for text in TEXTS[4:6]
    ]


def test_a_damaged_input_is_one_line_and_writes_nothing(
    tmp_path: Path, inputs: Path, tokenizer: Path
) -> None:
    damaged = inputs / "c.jsonl.zst"
    damaged.write_bytes(damaged.read_bytes()[:-3])
    output = refused("data", "tokenize", inputs, "--out", tmp_path / "out" / "x", "--tokenizer",
                     tokenizer)  # fmt: skip
    assert f"Error: {damaged}:1: cannot be unpacked" in output
    assert list((tmp_path / "out").iterdir()) == []
    output = refused("data", "tokenize", inputs, "--out", tmp_path / "out" / "x", "--tokenizer",
                     tmp_path / "gone.json")  # fmt: skip
    assert "gone.json: no such file; a tokenizer is" in output


def sha256(rows: np.ndarray) -> str:
    return hashlib.sha256(rows.astype("<i4").tobytes()).hexdigest()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_batches_come_out_in_every_form_with_one_digest(
    config: Path, tmp_path: Path, split: str
) -> None:
    served = data.batches(configs.load(config), split)
    rows = np.concatenate([served[0], served[1]])

    def dumped(out: str, *more: object) -> Path:
        result = run("data", "batches", config, "--start", 0, "--stop", 2, "--split", split,
                     "--out", tmp_path / out, *more)  # fmt: skip
        assert result.exit_code == 0, result.output
        assert f"8 rows of 9 tokens, sha256 {sha256(rows)}" in result.output
        return tmp_path / out

    np.testing.assert_array_equal(np.load(dumped("x.npy")), rows)
    lines = [json.loads(line) for line in dumped("x.jsonl", "--format", "jsonl").open()]
    assert [line["tokens"] for line in lines] == rows.tolist()
    folder = dumped("steps", "--per-step")
    for step in range(2):
        np.testing.assert_array_equal(np.load(folder / f"step-{step:06d}.npy"), served[step])
    folder = dumped("lines", "--per-step", "--format", "jsonl")
    lines = [json.loads(line) for path in sorted(folder.iterdir()) for line in path.open()]
    assert [line["tokens"] for line in lines] == rows.tolist()


def test_a_bare_prefix_stands_for_a_config(config: Path, tmp_path: Path) -> None:
    flags = ("--data.sequence-length", 8, "--training.steps", 6, "--training.batch-size", 4,
             "--start", 1, "--stop", 3)  # fmt: skip
    named = run("data", "batches", config, "--start", 1, "--stop", 3, "--out", tmp_path / "a.npy")
    bare = run("data", "batches", tmp_path / "corpus", *flags, "--out", tmp_path / "b.npy")
    assert (named.exit_code, bare.exit_code) == (0, 0), named.output + bare.output
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_map_runs_a_function_of_the_current_folder(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("statistics_of_mine.py").write_text(
        "def largest(step, rows):\n    return rows.max(axis=1)\n"
        "def broken(step, rows):\n    return 1 // (3 - step)\n"
    )
    base = ("data", "batches", config, "--start", 1, "--stop", 5, "--out", "x.jsonl", "--map")
    result = run(*base, "statistics_of_mine:largest")
    served = data.batches(configs.load(config))
    assert result.exit_code == 0, result.output
    assert sha256(np.concatenate([served[step] for step in range(1, 5)])) in result.output
    assert [json.loads(line) for line in Path("x.jsonl").read_text().splitlines()] == [
        {"step": step, "value": served[step].max(axis=1).tolist()} for step in range(1, 5)
    ]
    output = refused(*base, "statistics_of_mine:broken")
    assert "statistics_of_mine:broken failed at step 3: ZeroDivisionError" in output
    assert "has no larges; the nearest is 'largest'" in refused(*base, "statistics_of_mine:larges")
    assert "leave --per-step" in refused(*base, "statistics_of_mine:largest", "--per-step")
    sys.modules.pop("statistics_of_mine")


def test_order_tells_of_the_split_asked_for(inputs: Path, tokenizer: Path, tmp_path: Path) -> None:
    run("data", "tokenize", inputs, "--out", tmp_path / "made", "--tokenizer", tokenizer)
    flags = ["--data.sequence-length", "8", "--training.steps", "20", "--training.batch-size", "4"]
    told = run("data", "order", tmp_path / "made", *flags)
    assert told.exit_code == 0
    assert told.output.startswith("train_0: 20 steps of 4 rows, 80 samples, 640 tokens")
    assert "shuffled together" in told.output
    split = ["--data.split", "90,10,0", "--split", "validation"]
    assert run("data", "order", tmp_path / "made", *flags, *split).output.startswith("valid: ")
    assert "no documents for test" in refused(
        "data", "order", tmp_path / "made", *flags, *split[:-1], "test"
    )


def test_a_dataset_is_replaced_only_if_asked(tokenizer: Path, tmp_path: Path) -> None:
    text, made = tmp_path / "text.txt", tmp_path / "made"
    command = ("data", "tokenize", text, "--tokenizer", tokenizer, "--out", made)
    text.write_text("one two three")
    assert run(*command).exit_code == 0
    before = made.with_suffix(".bin").read_bytes()
    text.write_text("three two one two")
    assert "made.idx: there already; give --overwrite" in refused(*command)
    assert made.with_suffix(".bin").read_bytes() == before
    assert run(*command, "--overwrite").exit_code == 0
    assert made.with_suffix(".bin").read_bytes() != before
