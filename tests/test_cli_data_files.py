"""`pythia-jax data verify`, `shard` and `unshard` as their users type them."""

import hashlib
from functools import partial
from pathlib import Path

import command_line
import numpy as np
import pytest

from pythia_jax.data import IndexedDatasetWriter

run = partial(command_line.run, "data")


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        writer.add(range(1000))
    return tmp_path / "data"


def test_sharded_and_merged_again_it_is_the_same(prefix: Path, tmp_path: Path) -> None:
    result = run("shard", prefix, "--out", tmp_path / "s", "--shard-bytes", 777)
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 's'}-00000-of-00002.bin: 4 files in all" in result.output
    result = run("unshard", tmp_path / "s", "--out", tmp_path / "m")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "m.bin").read_bytes() == (tmp_path / "data.bin").read_bytes()
    result = run("unshard", tmp_path / "s", "--out", tmp_path / "m")
    assert result.exit_code == 1
    assert "m.bin: there already" in result.output


def test_verify_says_right_or_lists_what_is_wrong(prefix: Path, tmp_path: Path) -> None:
    hashes = tmp_path / "hashes"
    hashes.write_text(
        "".join(
            f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n"
            for path in (tmp_path / "data.bin", tmp_path / "data.idx")
        )
    )
    right = run("verify", prefix, "--hashes", hashes, "--vocab-size", 1000)
    assert right.exit_code == 0, right.output
    assert "right: structure, token ids" in right.output and "hashes" in right.output
    wrong = run("verify", prefix, tmp_path / "gone", "--vocab-size", 900)
    assert wrong.exit_code == 1
    assert "100 token ids are not 0 to 899" in wrong.output
    assert "gone.idx: no such file" in wrong.output
    assert "Traceback" not in wrong.output
    (tmp_path / "data.idx").unlink()
    assert run("verify", prefix).exit_code == 1
    assert run("verify", prefix, "--no-index").exit_code == 0


def test_a_bad_hash_file_is_one_line(prefix: Path, tmp_path: Path) -> None:
    result = run("verify", prefix, "--hashes", tmp_path / "none")
    assert result.exit_code == 1
    assert "none" in result.output
    assert "Traceback" not in result.output
