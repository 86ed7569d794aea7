"""The .bin/.idx format: its bytes, what comes back from it, and how damage shows."""

import hashlib
import pickle
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pythia_jax.data import IndexedDataset, IndexedDatasetWriter, open, token_dtype
from pythia_jax.data.indexed import DTYPES

ALL_DTYPES = [dtype.name for dtype in DTYPES.values()]


def write(prefix, documents, dtype="uint16"):
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add(document)
    return Path(prefix)


@pytest.fixture
def small(tmp_path):
    """The dataset of the recipe's test vector: documents of 5, 2 and 4 tokens."""
    return write(tmp_path / "small", [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11]])


def damage(path, offset, value):
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    path.write_bytes(bytes(content))


def test_index_bytes_equal_those_of_neox(small):
    content = small.with_suffix(".idx").read_bytes()
    assert content[:34].hex() == (
        "4d4d4944494458000001000000000000000803000000000000000400000000000000"
    )
    assert len(content) == 102
    assert hashlib.sha256(content).hexdigest() == (
        "c0268f4ab5636360f35f56c923a7fb1c008e07861f3d34fe2463b8b127e14759"
    )
    tokens = np.arange(1, 12, dtype="<u2").tobytes()
    assert small.with_suffix(".bin").read_bytes() == tokens


def test_dtype_codes_are_those_of_neox():
    assert {code: dtype.name for code, dtype in DTYPES.items()} == {
        1: "uint8",
        2: "int8",
        3: "int16",
        4: "int32",
        5: "int64",
        6: "float32",
        7: "float64",
        8: "uint16",
    }


def test_token_dtype_changes_at_65500():
    assert [token_dtype(size).name for size in (50277, 65499, 65500)] == [
        "uint16",
        "uint16",
        "int32",
    ]


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_every_dtype_comes_back(tmp_path, dtype):
    limits = np.finfo(dtype) if dtype.startswith("float") else np.iinfo(dtype)
    documents = [[limits.min, limits.max], [], [1, 2, 3], [0]]
    dataset = open(write(tmp_path / dtype, documents, dtype))
    assert dataset.dtype == np.dtype(dtype)
    assert len(dataset) == 4
    assert dataset.num_tokens == 6
    assert [list(dataset[i]) for i in range(4)] == documents


def test_fields_of_a_dataset(small):
    dataset = open(small)
    assert (dataset.sizes.dtype, dataset.pointers.dtype) == (np.int32, np.int64)
    assert list(dataset.sizes) == [5, 2, 4]
    assert list(dataset.pointers) == [0, 10, 14]
    assert list(dataset.document_index) == [0, 1, 2, 3]
    assert list(dataset.tokens) == list(range(1, 12))
    assert list(dataset[-1]) == [8, 9, 10, 11]
    assert "3 documents, 11 tokens, uint16" in repr(dataset)


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_prefix_may_carry_a_suffix(tmp_path, suffix):
    prefix = write(tmp_path / "pile_0.87_deduped", [[1]])
    assert len(open(f"{prefix}{suffix}")) == 1
    assert len(IndexedDataset(f"{prefix}{suffix}")) == 1


def test_spans_are_read_end_to_end(small):
    spans = open(small).read_spans(np.array([9, 0, 4, 2]), np.array([2, 1, 0, 3]))
    assert list(spans) == [10, 11, 1, 3, 4, 5]


def test_pickled_dataset_carries_no_tokens_and_reads_the_same(tmp_path):
    dataset = open(write(tmp_path / "data", [np.arange(5000)] * 3))
    assert dataset.tokens.size == 15000
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 2000
    assert np.array_equal(pickle.loads(pickled)[2], dataset[2])


def test_document_out_of_range_is_an_index_error(small):
    with pytest.raises(IndexError, match="document 3 asked for, but it has 3"):
        open(small)[3]


def test_empty_dataset_comes_back(tmp_path):
    dataset = open(write(tmp_path / "empty", []))
    assert (len(dataset), dataset.num_tokens, dataset.tokens.size) == (0, 0, 0)
    assert list(dataset.document_index) == [0]


@settings(max_examples=25, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 65535), max_size=20), max_size=30),
    split=st.integers(0, 30),
)
def test_any_documents_come_back_one_by_one_or_together(documents, split):
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "data")
        with IndexedDatasetWriter(prefix, np.uint16) as writer:
            for document in documents[:split]:
                writer.add(document)
            rest = documents[split:]
            tokens = [token for document in rest for token in document]
            writer.add_documents(np.array(tokens, int), [len(document) for document in rest])
        dataset = open(prefix)
        assert [list(dataset[i]) for i in range(len(dataset))] == documents


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    suffix=st.sampled_from([".bin", ".idx"]),
    share=st.floats(0, 1, exclude_max=True),
)
def test_any_truncation_is_one_clear_error(sizes, suffix, share):
    with tempfile.TemporaryDirectory() as folder:
        prefix = write(Path(folder, "data"), [range(size) for size in [*sizes, 1]])
        path = prefix.with_suffix(suffix)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=suffix):
            open(prefix)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8), where=st.floats(0, 1), bit=st.data()
)
def test_any_flipped_bit_of_sizes_and_pointers_is_one_clear_error(sizes, where, bit):
    with tempfile.TemporaryDirectory() as folder:
        prefix = write(Path(folder, "data"), [range(size) for size in sizes])
        path = prefix.with_suffix(".idx")
        content = bytearray(path.read_bytes())
        offset = 34 + int(where * (12 * len(sizes) - 1))
        content[offset] ^= 1 << bit.draw(st.integers(0, 7))
        path.write_bytes(bytes(content))
        with pytest.raises(ValueError, match="data"):
            open(prefix)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"TNTIDX\x00\x00\x00", "not an index of GPT-NeoX's mmap format"),
        (9, struct.pack("<Q", 2), "format version 2"),
        (17, b"\x09", "unknown dtype code 9"),
        (18, struct.pack("<Q", 2**63), "truncated or damaged"),
        (26, struct.pack("<Q", 9), "truncated or damaged"),
        (34, struct.pack("<i", -5), "document 0 has size -5"),
        (46, struct.pack("<q", 2), "document 0 has size 5 and pointer 2"),
        (42, struct.pack("<i", 400), "holds 22 bytes, but its index promises 407 tokens"),
    ],
)
def test_damaged_index_says_what_is_wrong(small, offset, value, message):
    damage(small.with_suffix(".idx"), offset, value)
    with pytest.raises(ValueError, match=message):
        open(small)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file_is_named(small, suffix):
    small.with_suffix(suffix).unlink()
    with pytest.raises(FileNotFoundError, match=f"small{suffix}: no such file"):
        open(small)


@pytest.mark.parametrize(
    ("dtype", "tokens", "message"),
    [
        ("uint16", [1, 65536], "token 65536 does not fit uint16"),
        ("uint16", [-1, 3], "token -1 does not fit uint16"),
        ("int8", [200, -200], "token 200 does not fit int8"),
        ("int32", [0.5], "must be whole numbers"),
        ("int32", [2**70], "must be whole numbers"),
        ("int32", [[1, 2], [3, 4]], "give one flat sequence"),
    ],
)
def test_tokens_that_do_not_fit_are_refused_and_leave_nothing(tmp_path, dtype, tokens, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "data", [[1], tokens], dtype)
    assert list(tmp_path.iterdir()) == []


def test_dtype_without_a_code_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot store uint32; choose from uint8"):
        IndexedDatasetWriter(tmp_path / "data", np.uint32)


def test_failed_writer_leaves_the_old_dataset(small):
    with pytest.raises(RuntimeError), IndexedDatasetWriter(small, np.int32) as writer:
        writer.add([1, 2])
        raise RuntimeError
    assert len(list(small.parent.iterdir())) == 2
    assert list(open(small)[1]) == [6, 7]


def test_nothing_has_its_name_before_the_end_and_folders_are_made(tmp_path):
    prefix = tmp_path / "deep" / "data"
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add([1])
        assert not prefix.with_suffix(".bin").exists()
        assert not prefix.with_suffix(".idx").exists()
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["data.bin", "data.idx"]
