"""Verification finds every kind of damage, names it, and is silent about what is right."""

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import RangeServer, serving

from pythia_jax.data import IndexedDatasetWriter
from pythia_jax.data import verify as verify_module
from pythia_jax.data.indexed import DTYPES, open_dataset
from pythia_jax.data.shards import shard
from pythia_jax.data.verify import check_ids, read_hashes, verify

ALL_DTYPES = [dtype.name for dtype in DTYPES.values()]


@pytest.fixture
def data(tmp_path):
    """Documents of 700, 0 and 300 tokens, ids 0 to 699."""
    with IndexedDatasetWriter(tmp_path / "data", np.int32) as writer:
        for size in (700, 0, 300):
            writer.add(range(size))
    return tmp_path / "data"


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def damage(path, offset, value):
    content = bytearray(Path(path).read_bytes())
    content[offset : offset + len(value)] = value
    Path(path).write_bytes(bytes(content))


def hash_file(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_what_is_right_gives_nothing(data, tmp_path):
    shard(data, tmp_path / "sharded", 999)
    assert verify([data, tmp_path / "sharded"], vocab_size=700) == []


@pytest.mark.parametrize("dtype", ["uint16", "int64"])
def test_ids_outside_the_vocabulary_are_counted_and_the_first_is_named(tmp_path, dtype):
    with IndexedDatasetWriter(tmp_path / "data", dtype) as writer:
        writer.add([5, 6, 7, 8, 9, 7, 8])
    assert verify([tmp_path / "data"], vocab_size=10) == []
    (line,) = verify([tmp_path / "data"], vocab_size=8)
    assert "data.bin: 3 token ids are not 0 to 7, the first of them 8 at token 3" in line


def test_negative_ids_are_found_without_a_vocabulary(data):
    damage(f"{data}.bin", 4 * 55 + 3, b"\x80")
    (line,) = verify([data])
    assert "1 token ids are not 0 to 2147483647, the first of them -2147483593 at token 55" in line


@settings(max_examples=40, deadline=None)
@given(
    place=st.integers(0, 59),
    shard_bytes=st.integers(1, 250),
    chunk=st.sampled_from([8, 16, 64]),
    dtype=st.sampled_from(["uint16", "int32", "int64"]),
)
def test_a_bad_id_is_found_wherever_shards_and_chunks_are_cut(
    tmp_path_factory, place, shard_bytes, chunk, dtype
):
    folder = tmp_path_factory.mktemp("v")
    tokens = np.arange(60)
    tokens[place] = 300
    with IndexedDatasetWriter(folder / "a", dtype) as writer:
        writer.add(tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_module, "_CHUNK", chunk)
        patch.setattr("os.fsync", lambda _: None)
        shard(folder / "a", folder / "b", shard_bytes)
        for prefix in ("a", "b"):
            (line,) = verify([folder / prefix], vocab_size=300)
            assert f"300 at token {place} of the dataset" in line
            assert verify([folder / prefix], vocab_size=301) == []


def test_float_data_is_no_token_ids(tmp_path):
    with IndexedDatasetWriter(tmp_path / "data", np.float32) as writer:
        writer.add([1.5])
    (line,) = verify([tmp_path / "data"])
    assert "holds float32, not token ids" in line


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"TNTIDX", "not an index of GPT-NeoX's mmap format"),
        (9, b"\x02", "format version 2"),
        (17, b"\x63", "unknown dtype code 99"),
        (34, struct.pack("<i", -1), "document 0 has size -1"),
        (34 + 12 + 8, struct.pack("<q", 4), "document 1 has size 0 and pointer 4"),
        (34 + 36, struct.pack("<q", 1), "its document index does not go from 0 up to 3"),
        (34 + 36 + 8, struct.pack("<q", 3), "its document index does not go from 0 up to 3"),
        (34 + 36 + 24, struct.pack("<q", 4), "its document index does not go from 0 up to 3"),
    ],
)
def test_damage_of_the_index_is_found(data, offset, value, message):
    damage(f"{data}.idx", offset, value)
    (line,) = verify([data])
    assert message in line
    assert "data.idx" in line


def test_damage_of_one_dataset_does_not_hide_that_of_another(data, tmp_path):
    Path(f"{data}.bin").write_bytes(b"short")
    first, second = verify([data, tmp_path / "gone"])
    assert "data.bin: holds 5 bytes, but its index promises 1000 tokens" in first
    assert "gone.idx: no such file" in second


def test_hashes_of_every_file_are_checked(data, tmp_path):
    files = [f"{data}.bin", f"{data}.idx"]
    good = hash_file(tmp_path / "a", [f"{Path(f).name} {sha256(f)}" for f in files])
    assert verify([data], good) == []
    swapped = hash_file(
        tmp_path / "b", [f"data.bin {sha256(files[1])}", f"data.idx {sha256(files[0])}"]
    )
    lines = verify([data], swapped)
    assert [line.partition(":")[0] for line in lines] == files
    assert f"its SHA-256 is {sha256(files[0])}, not {sha256(files[1])}" in lines[0]
    (line,) = verify([data], hash_file(tmp_path / "c", [f"data.bin {sha256(files[0])}"]))
    assert f"data.idx: {tmp_path / 'c'} has no hash to compare with" in line


def test_both_ways_of_writing_hashes_are_understood(tmp_path):
    one, two = "ab" * 32, "cd" * 32
    lines = [f"a b.bin {one}", "", "# a comment", f"{two.upper()}  dir/c.bin", f"{one} *d.bin"]
    assert read_hashes(hash_file(tmp_path / "h", lines)) == {
        "a b.bin": one,
        "c.bin": two,
        "d.bin": one,
    }


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a.bin abc"], "h:1: no SHA-256 and name in 'a.bin abc'"),
        (["a " + "0" * 64, "a " + "1" * 64], "h:2: a stands here with two hashes"),
    ],
)
def test_bad_hash_files_are_refused(data, tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        verify([data], hash_file(tmp_path / "h", lines))


def test_shards_go_by_their_own_hashes_or_by_that_of_the_merged_file(data, tmp_path):
    written = shard(data, tmp_path / "out" / "data", 999)
    each = [f"{path.name} {sha256(path)}" for path in written]
    merged = f"data.bin {sha256(f'{data}.bin')}"
    prefix = tmp_path / "out" / "data"
    for lines in (each, [merged, each[-1]], [*each, merged]):
        assert verify([prefix], hash_file(tmp_path / "h", lines)) == []
    damage(written[2], 7, b"\xff")
    (line,) = verify([prefix], hash_file(tmp_path / "h", each))
    assert str(written[2]) in line
    (line,) = verify([prefix], hash_file(tmp_path / "h", [merged, each[-1]]))
    assert "data.bin, as its shards make it: its SHA-256 is" in line
    line = verify([prefix], hash_file(tmp_path / "h", each[1:]))[0]
    assert line == f"{written[0]}: {tmp_path / 'h'} has no hash to compare with"


def test_preshuffled_data_is_verified_without_an_index(data):
    Path(f"{data}.idx").unlink()
    assert "data.idx: no such file" in verify([data])[0]
    assert verify([data], index=False) == []


def test_progress_counts_every_byte_once(data, tmp_path, monkeypatch):
    monkeypatch.setattr(verify_module, "_CHUNK", 512)
    written = shard(data, tmp_path / "out" / "data", 999)
    lines = [f"{path.name} {sha256(path)}" for path in written]
    seen = []
    verify(
        [tmp_path / "out" / "data"],
        hash_file(tmp_path / "h", lines),
        progress=lambda *done: seen.append(done),
    )
    total = 4000 + written[-1].stat().st_size
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)


def test_a_remote_dataset_is_verified_too(data):
    files = {f"/d{suffix}": Path(f"{data}{suffix}").read_bytes() for suffix in (".bin", ".idx")}
    server = RangeServer(files)
    with serving(server):
        assert verify([f"{server.url}/d"], vocab_size=700) == []
        (line,) = verify([f"{server.url}/d"], vocab_size=600)
        assert "100 token ids are not 0 to 599" in line
        content = bytearray(files["/d.idx"])
        content[34 + 12 + 8] = 4  # a pointer that remote reading works out for itself
        server.files["/d.idx"] = bytes(content)
        (line,) = verify([f"{server.url}/d"])
        assert "d.idx: the pointer of document 1 is" in line


@settings(max_examples=150, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(ALL_DTYPES))
def test_flipped_bytes_change_tokens_only_or_are_one_clear_error(tmp_path_factory, data, dtype):
    """Any bytes of both files; never another exception, never wrong shapes."""
    folder = tmp_path_factory.mktemp("flip")
    sizes = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        with IndexedDatasetWriter(folder / "d", dtype) as writer:
            for size in sizes:
                writer.add(np.arange(size).astype(dtype))
    suffix = data.draw(st.sampled_from([".idx", ".bin"]))
    path = folder / f"d{suffix}"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content))
    try:
        dataset = open_dataset(folder / "d")
        found = [dataset[i] for i in range(len(dataset))]
    except ValueError as error:
        assert "d.idx" in str(error) or "d.bin" in str(error)
        return
    if dataset.dtype.itemsize == np.dtype(dtype).itemsize:  # another type of the same width
        assert [len(document) for document in found] == sizes
    assert sum(len(document) for document in found) == dataset.num_tokens
    assert all(isinstance(line, str) for line in verify([folder / "d"]))


def test_ids_outside_the_vocabulary_are_refused_before_a_run(data, tmp_path, caplog):
    shard(data, tmp_path / "sharded", 999)
    check_ids([data, tmp_path / "sharded"], 700)
    with pytest.raises(ValueError, match=r"data\.bin: 1 token ids are not 0 to 698, .* 699"):
        check_ids([data], 699)
    with pytest.raises(ValueError, match="699 at token 699"):
        check_ids([tmp_path / "sharded"], 699)
    caplog.set_level("INFO")
    check_ids([data, "https://example.org/data"], 699, most=3999)
    assert [record.args[0] for record in caplog.records] == [data, "https://example.org/data"]


def test_preshuffled_rows_without_an_index_are_checked_too(tmp_path):
    np.arange(660, dtype="<u2").tofile(tmp_path / "rows.bin")
    check_ids([tmp_path / "rows"], 660)
    with pytest.raises(ValueError, match="the first of them 659 at token 659"):
        check_ids([tmp_path / "rows"], 659)
