"""Sharding and unsharding: upstream's files, and nothing half done."""

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pythia_jax.data import IndexedDatasetWriter, open, shards
from pythia_jax.data.shards import shard, unshard


@pytest.fixture
def data(tmp_path):
    """1,000 uint16 tokens."""
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        writer.add(range(700))
        writer.add(range(300))
    return tmp_path / "data"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_shards_are_those_of_upstream(data, tmp_path):
    written = shard(data, tmp_path / "out" / "d", 601)
    assert [path.name for path in written] == [
        "d-00000-of-00003.bin",
        "d-00001-of-00003.bin",
        "d-00002-of-00003.bin",
        "d-00003-of-00003.bin",
        "d.idx",
    ]
    assert names(tmp_path / "out") == sorted(path.name for path in written)
    assert [path.stat().st_size for path in written[:4]] == [601, 601, 601, 197]
    assert b"".join(path.read_bytes() for path in written[:4]) == Path(f"{data}.bin").read_bytes()
    assert written[4].read_bytes() == Path(f"{data}.idx").read_bytes()


@pytest.mark.parametrize(("shard_bytes", "sizes"), [(1000, [1000, 1000, 0]), (5000, [2000])])
def test_the_number_of_shards_is_one_more_than_whole_ones(data, tmp_path, shard_bytes, sizes):
    written = shard(data, tmp_path / "d", shard_bytes)
    assert [path.stat().st_size for path in written[:-1]] == sizes
    assert np.array_equal(open(tmp_path / "d")[0], np.arange(700))


@settings(max_examples=10, deadline=None)
@given(size=st.integers(0, 300), shard_bytes=st.integers(1, 320), again=st.integers(1, 320))
def test_unsharding_gives_back_what_was_sharded(size, shard_bytes, again):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_CHUNK", 50)
        with IndexedDatasetWriter(Path(folder, "a"), np.uint16) as writer:
            writer.add(np.arange(size))
        shard(Path(folder, "a"), Path(folder, "b"), shard_bytes)
        shard(Path(folder, "b"), Path(folder, "c"), again)  # from shards to other shards
        unshard(Path(folder, "c"), Path(folder, "d"))
        for suffix in (".bin", ".idx"):
            assert (
                Path(folder, f"d{suffix}").read_bytes() == Path(folder, f"a{suffix}").read_bytes()
            )


def test_beside_its_source_the_index_serves_both(data):
    shard(data, data, 999)
    Path(f"{data}.bin").unlink()
    assert [path.name for path in unshard(data, data)] == ["data.bin"]


def test_without_an_index_the_tokens_alone_are_written(data, tmp_path):
    Path(f"{data}.idx").unlink()
    assert len(shard(data, tmp_path / "d", 1500)) == 2


def test_progress_counts_the_bytes(data, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_CHUNK", 512)
    seen = []
    unshard(data, tmp_path / "d", progress=lambda *done: seen.append(done))
    total = 2000 + os.path.getsize(f"{data}.idx")
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == ((512, total), (total, total))


def test_nothing_is_overwritten(data, tmp_path):
    with pytest.raises(FileExistsError, match=r"data.bin: there already"):
        unshard(data, data)
    shard(data, tmp_path / "d", 601)
    with pytest.raises(FileExistsError, match=r"d-00000-of-00003.bin: there already; remove"):
        shard(data, tmp_path / "d", 700)
    (tmp_path / "e.idx").write_bytes(b"another")
    for attempt in (lambda: shard(data, tmp_path / "e"), lambda: unshard(data, tmp_path / "e")):
        with pytest.raises(FileExistsError, match=r"e.idx: there already"):
            attempt()


def test_a_failure_leaves_nothing(data, tmp_path, monkeypatch):
    def fail(done, total):
        if done > 1500:
            raise KeyboardInterrupt

    monkeypatch.setattr(shards, "_CHUNK", 512)
    before = names(tmp_path)
    for attempt in (shard, unshard):
        with pytest.raises(KeyboardInterrupt):
            attempt(data, tmp_path / "d", progress=fail)
        assert names(tmp_path) == before


def test_a_full_disk_is_told_beforehand(data, tmp_path, monkeypatch):
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: SimpleNamespace(free=2000))
    with pytest.raises(OSError, match=r"0.0 GB to write, but only 0.0 GB are free"):
        unshard(data, tmp_path / "d")
    assert not (tmp_path / "d.bin").exists()


def test_bad_arguments_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match="shards of 0 bytes"):
        shard(data, tmp_path / "d", 0)
    with pytest.raises(ValueError, match=r"s3://b/d: files are written on this machine"):
        unshard(data, "s3://b/d")
    with pytest.raises(FileNotFoundError, match=r"gone.bin: no such file"):
        unshard(tmp_path / "gone", tmp_path / "d")
