"""Bytes where they lie: shards read as one file, and what is wrong with a set is named."""

import pickle
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pythia_jax.data import IndexedDatasetWriter, open
from pythia_jax.data.indexed import DTYPES, Index
from pythia_jax.data.storage import (
    LocalFiles,
    cut_at_borders,
    find_tokens,
    open_bytes,
    strip_suffix,
    token_files,
    with_suffix,
)

ALL_DTYPES = [dtype.name for dtype in DTYPES.values()]


def cut(content, length):
    """What GPT-NeoX's sharding gives: floor(size / length) + 1 pieces, the last one shorter."""
    return [content[i * length : (i + 1) * length] for i in range(len(content) // length + 1)]


def write_shards(prefix, pieces):
    for i, piece in enumerate(pieces):
        Path(f"{prefix}-{i:05d}-of-{len(pieces) - 1:05d}.bin").write_bytes(piece)
    return str(prefix)


@pytest.fixture
def shards(tmp_path):
    """100 bytes, 0 to 99, in shards of 30: 30, 30, 30, 10."""
    return write_shards(tmp_path / "pile_0.87", cut(bytes(range(100)), 30))


@pytest.mark.parametrize("end", ["", ".bin", "-00000-of-00003", "-00000-of-00003.bin"])
def test_a_shard_set_goes_by_its_prefix_or_its_first_shard(shards, end):
    found = find_tokens(f"{shards}{end}")
    assert found.size == 100
    assert found.read(0, 100).tobytes() == bytes(range(100))


def test_a_file_of_the_prefix_comes_before_its_shards_unless_they_are_named(shards):
    Path(f"{shards}.bin").write_bytes(b"merged")
    assert find_tokens(shards).read(0, 6).tobytes() == b"merged"
    assert find_tokens(f"{shards}.bin").size == 6
    assert find_tokens(f"{shards}-00000-of-00003").size == 100


def test_one_shard_is_a_set(tmp_path):
    prefix = write_shards(tmp_path / "one", [b"abc"])
    assert find_tokens(prefix).read(1, 3).tobytes() == b"bc"


def test_relative_and_odd_prefixes_are_found(shards, monkeypatch):
    monkeypatch.chdir(Path(shards).parent)
    for prefix in ("pile_0.87", "./pile_0.87", f"{Path(shards).parent}//pile_0.87"):
        assert find_tokens(prefix).size == 100
    Path("a [b]*").mkdir()
    write_shards("a [b]*/c?", [b"ab", b"c"])
    assert find_tokens("a [b]*/c?").read(0, 3).tobytes() == b"abc"


def test_ranges_come_in_the_order_asked_for_and_across_borders(shards):
    found = find_tokens(shards).read_ranges(np.array([85, 0, 29, 40]), np.array([15, 2, 32, 0]))
    assert found.tolist() == [*range(85, 100), 0, 1, *range(29, 61)]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), size=st.integers(1, 300), length=st.integers(1, 320))
def test_shards_of_any_length_read_as_the_merged_file(data, size, length):
    content = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    bounds = st.lists(st.tuples(st.integers(0, size), st.integers(0, size)), max_size=20)
    spans = [sorted(pair) for pair in data.draw(bounds)]
    starts = np.array([a for a, _ in spans], np.int64)
    lengths = np.array([b - a for a, b in spans], np.int64)
    with tempfile.TemporaryDirectory() as folder:
        found = find_tokens(write_shards(Path(folder, "p"), cut(content.tobytes(), length)))
        expected = np.concatenate([content[:0], *(content[a:b] for a, b in spans)])
        assert np.array_equal(found.read_ranges(starts, lengths), expected)
        for start, stop in spans:
            assert np.array_equal(found.read(start, stop), content[start:stop])


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(ALL_DTYPES),
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    length=st.integers(1, 90),
    seed=st.integers(0, 1000),
)
def test_a_sharded_dataset_of_any_dtype_equals_the_merged_one(dtype, sizes, length, seed):
    """Shard borders fall on tokens and inside them."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "data")
        with IndexedDatasetWriter(prefix, dtype) as writer:
            for size in sizes:
                writer.add(rng.integers(0, 100, size).astype(dtype))
        merged = open(prefix)
        tokens = merged.tokens.copy()
        documents = [merged[i].copy() for i in range(len(merged))]
        content = prefix.with_suffix(".bin").read_bytes()
        prefix.with_suffix(".bin").unlink()
        sharded = open(write_shards(prefix, cut(content, length)))
        assert sharded.content_hash() == merged.content_hash()
        for i, document in enumerate(documents):
            assert sharded[i].dtype == document.dtype
            assert np.array_equal(sharded[i], document)
        starts = rng.integers(0, len(tokens) + 1, 30)
        lengths = np.array([rng.integers(0, len(tokens) - start + 1) for start in starts])
        spans = [tokens[a : a + n] for a, n in zip(starts, lengths, strict=True)]
        assert np.array_equal(sharded.read_spans(starts, lengths), np.concatenate(spans))


def test_borders_of_shards_of_five_billion_bytes_are_where_they_should_be():
    """Pythia's own: 83 shards, no multiple of a row of 4098 bytes, and no int32 in sight."""
    sizes = [5_000_000_000] * 82 + [1_234_567_891]
    row = np.arange(99_999_000, 100_001_000, dtype=np.int64)
    file, start, length = cut_at_borders(row * 4098, np.full(len(row), 4098), sizes)
    assert len(file) == len(row)  # 409.8 GB in, no border lies here
    edges = np.arange(1, 83) * 5_000_000_000
    file, start, length = cut_at_borders(edges - 1000, np.full(82, 4098), sizes)
    assert file.tolist() == [k + i for k in range(82) for i in (0, 1)]
    assert start.tolist() == [4_999_999_000, 0] * 82
    assert length.tolist() == [1000, 3098] * 82


def test_sparse_shards_of_real_length_are_read_at_the_border(tmp_path):
    """Files of 5,000,000,001 bytes that take no room."""
    for number in range(3):
        with Path(tmp_path, f"p-{number:05d}-of-00002.bin").open("wb") as file:
            file.write(bytes([number, 7]))
            file.truncate(5_000_000_001 if number < 2 else 10)
            file.seek(4_999_999_999 if number < 2 else 8)
            file.write(bytes([8, number]))
    found = find_tokens(tmp_path / "p")
    assert found.size == 10_000_000_012
    assert found.read(5_000_000_000, 5_000_000_003).tolist() == [0, 1, 7]
    assert found.read_ranges(np.array([10_000_000_000]), np.array([4])).tolist() == [8, 1, 2, 7]


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_missing_shard_is_named(shards, number):
    path = Path(f"{shards}-{number:05d}-of-00003.bin")
    path.unlink()
    message = f"{path}: no such file; 1 of the 4 shards"
    with pytest.raises(FileNotFoundError, match=message):
        find_tokens(shards)
    with pytest.raises(FileNotFoundError, match=message):
        find_tokens(f"{shards}-00000-of-00003")


def test_many_missing_shards_are_counted(shards):
    for number in (0, 2):
        Path(f"{shards}-{number:05d}-of-00003.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of the 4 shards of .* missing: 0, 2"):
        find_tokens(shards)


@pytest.mark.parametrize(
    ("number", "size", "message"),
    [
        (0, 29, "00000-of-00003.bin: holds 29 bytes, but the other shards 30"),
        (1, 31, "00001-of-00003.bin: holds 31 bytes, but the other shards 30"),
        (3, 31, "00003-of-00003.bin: the last shard holds 31 bytes and those before it 30"),
    ],
)
def test_a_shard_of_the_wrong_length_is_named(shards, number, size, message):
    Path(f"{shards}-{number:05d}-of-00003.bin").write_bytes(bytes(size))
    with pytest.raises(ValueError, match=message):
        find_tokens(shards)


def test_a_truncated_last_shard_is_found_by_the_index(tmp_path):
    prefix = tmp_path / "data"
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add(range(50))
    pieces = cut(prefix.with_suffix(".bin").read_bytes(), 30)
    prefix.with_suffix(".bin").unlink()
    write_shards(prefix, [*pieces[:-1], pieces[-1][:-1]])
    with pytest.raises(ValueError, match=r"00000-of-00003.bin and the 3 shards .* holds 99 bytes"):
        open(prefix)


def test_a_shard_too_many_and_mixed_sets_are_named(shards):
    Path(f"{shards}-00004-of-00003.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"00004-of-00003.bin: a shard too many"):
        find_tokens(shards)
    Path(f"{shards}-00004-of-00003.bin").unlink()
    Path(f"{shards}-00000-of-00007.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="several sets, numbered to 3, 7"):
        find_tokens(shards)
    assert find_tokens(f"{shards}-00000-of-00003").size == 100


def test_another_shard_than_the_first_does_not_name_the_set(shards):
    with pytest.raises(ValueError, match=r"one shard of a set; .*-00000-of-00003.bin"):
        find_tokens(f"{shards}-00002-of-00003.bin")


def test_nothing_there_names_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.bin: no such file, and no shards"):
        find_tokens(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"gone.bin: no such file"):
        find_tokens(tmp_path / "no" / "folder" / "gone")
    with pytest.raises(FileNotFoundError, match=r"gone.idx: no such file"):
        open_bytes(tmp_path / "gone.idx")


def test_an_empty_last_shard_is_fine(tmp_path):
    found = find_tokens(write_shards(tmp_path / "p", cut(bytes(range(60)), 30)))
    assert len(token_files(tmp_path / "p")) == 3
    assert found.read(25, 60).tolist() == list(range(25, 60))
    assert found.read(60, 60).size == 0


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (99, 2), (101, 0), (0, -1), (2**62, 2**62)])
def test_ranges_beyond_the_end_are_refused(shards, start, length):
    found = find_tokens(shards)
    with pytest.raises(IndexError, match="asked for, but it holds 100"):
        found.read_ranges(np.array([3, start]), np.array([2, length]))


def test_files_are_pickled_without_their_bytes_and_read_by_many_threads(tmp_path):
    content = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8)
    found = find_tokens(write_shards(tmp_path / "p", cut(content.tobytes(), 7_001)))
    assert found.read(0, 1).size
    pickled = pickle.dumps(found)
    assert len(pickled) < 5000
    copy = pickle.loads(pickled)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda i: copy.read(i * 1000, (i + 1) * 1000), range(100)))
    assert np.array_equal(np.concatenate(parts), content)


def test_the_tokens_of_shards_are_no_array(tmp_path):
    with IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        writer.add(range(20))
    (tmp_path / "d.bin").rename(tmp_path / "d-00000-of-00000.bin")
    assert open(tmp_path / "d").tokens.tolist() == list(range(20))  # one shard is one map
    write_shards(tmp_path / "d", cut((tmp_path / "d-00000-of-00000.bin").read_bytes(), 7))
    dataset = open(tmp_path / "d-00000-of-00005")
    with pytest.raises(ValueError, match="its tokens are no array; read_spans reads them"):
        _ = dataset.tokens


def test_an_index_is_read_without_its_tokens(tmp_path):
    with IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        writer.add(range(20))
    (tmp_path / "d.bin").unlink()
    index = Index(tmp_path / "d")
    assert (len(index), index.num_tokens, index.sizes.tolist()) == (1, 20, [20])


def test_the_content_hash_is_that_of_dtype_and_sizes(tmp_path):
    def hash_of(documents, dtype):
        with IndexedDatasetWriter(tmp_path / "d", dtype) as writer:
            for document in documents:
                writer.add(document)
        return Index(tmp_path / "d").content_hash()

    first = hash_of([[1, 2], [3]], np.uint16)
    assert first == hash_of([[3, 3], [9]], np.uint16)
    others = [hash_of([[1], [2, 3]], np.uint16), hash_of([[1, 2], [3]], np.int32)]
    others += [hash_of([[1, 2], [3], []], np.uint16), hash_of([[1, 2, 3]], np.uint16)]
    assert len({first, *others}) == 5


@pytest.mark.parametrize(
    ("prefix", "stripped", "index"),
    [
        ("a/b.c", "a/b.c", "a/b.c.idx"),
        ("a/b.c.bin", "a/b.c", "a/b.c.idx"),
        ("https://h/p.bin?key=a.bin", "https://h/p?key=a.bin", "https://h/p.idx?key=a.bin"),
        ("hf://datasets/o/r/p", "hf://datasets/o/r/p", "hf://datasets/o/r/p.idx"),
        ("a/what?.bin", "a/what?", "a/what?.idx"),
    ],
)
def test_suffixes_go_before_the_query_of_a_url(prefix, stripped, index):
    assert strip_suffix(prefix) == stripped
    assert with_suffix(stripped, ".idx") == index


def test_open_bytes_is_one_file(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    found = open_bytes(tmp_path / "f")
    assert isinstance(found, LocalFiles)
    assert (found.name, found.size) == (str(tmp_path / "f"), 3)
