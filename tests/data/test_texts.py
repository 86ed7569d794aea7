"""Which documents come out of which files, whole, packed and damaged."""

import gzip
import io
import itertools
import json
import random
import struct
import tracemalloc

import pytest
import zstandard

from pythia_jax.data import read_texts
from pythia_jax.data.texts import _ZstandardReader

TEXTS = ["the cat sat", "schöne Grüße\r\nfrom   here", "", "\u2028 one line\x85 still", "end"]
SKIPPABLE_FRAME = struct.pack("<II", 0x184D2A50, 5) + b"12345"  # RFC 8878, 3.1.2


def zstd(content):
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


def json_lines(texts):
    return "".join(json.dumps({"text": text, "meta": 1}) + "\n" for text in texts).encode()


PACKERS = {"": lambda content: content, ".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("packer", PACKERS)
def test_json_lines_come_out_of_any_packing_as_they_went_in(tmp_path, packer):
    path = tmp_path / f"d.jsonl{packer}"
    path.write_bytes(PACKERS[packer](json_lines(TEXTS) + b"\n  \n" + json_lines(["last"])[:-1]))
    assert list(read_texts(path)) == [*TEXTS, "last"]


@pytest.mark.parametrize("packer", PACKERS)
def test_plain_text_comes_out_of_any_packing_as_one_document(tmp_path, packer):
    path = tmp_path / f"d.txt{packer}"
    path.write_bytes(PACKERS[packer](TEXTS[1].encode()))
    assert list(read_texts(path)) == [TEXTS[1]]


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_files_packed_in_several_pieces_are_read_to_the_end(tmp_path, pack):
    path = tmp_path / ("d.jsonl.gz" if pack is gzip.compress else "d.jsonl.zst")
    content = json_lines(TEXTS)
    cuts = [0, 3, 3, 40, 41, len(content)]  # one piece is empty, most end within a line
    path.write_bytes(b"".join(pack(content[a:b]) for a, b in itertools.pairwise(cuts)))
    assert list(read_texts(path)) == TEXTS


def test_skippable_frames_of_zstandard_are_skipped(tmp_path):
    path = tmp_path / "d.jsonl.zst"
    frames = [SKIPPABLE_FRAME, zstd(json_lines(TEXTS)), SKIPPABLE_FRAME]
    path.write_bytes(b"".join(frames))
    assert list(read_texts(path)) == TEXTS


def test_long_lines_pass_through_zstandard_whole(tmp_path):
    rng = random.Random(0)
    texts = ["".join(chr(rng.randrange(32, 0x3000)) for _ in range(300_000)), "a" * 3_000_000]
    (tmp_path / "d.jsonl.zst").write_bytes(zstd(json_lines(texts)))
    assert list(read_texts(tmp_path / "d.jsonl.zst")) == texts


def test_a_folder_is_read_sorted_and_whole_but_for_hidden_and_binary_files(tmp_path):
    folder = tmp_path / ".cache" / "texts"
    for name, content in {
        "b/two.md": b"two",
        "a.txt": b"one",
        "c.jsonl": json_lines(["three", "four"]),
        "c.jsonl.gz": gzip.compress(json_lines(["five"])),
        "c.jsonl.zst": zstd(json_lines(["six"])),
        "d-latin1.txt": "fünf".encode("latin-1"),
        "e.pyc": b"\x00\x01",
        "e.tar.gz": gzip.compress(b"name\x00\x00"),
        ".git/config": b"hidden",
        "b/.secret": b"hidden",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert list(read_texts(folder)) == ["one", "two", "three", "four", "five", "six", "f\ufffdnf"]
    assert list(read_texts(folder, pattern="*.md")) == ["two"]
    assert list(read_texts([folder / "c.jsonl", folder / "b"])) == ["three", "four", "two"]


def test_text_key_chooses_the_text(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "no", "body": "yes"}')
    assert list(read_texts(path, text_key="body")) == ["yes"]


def test_bytes_read_grow_to_the_size_of_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.jsonl.zst").write_bytes(zstd(json_lines(TEXTS * 1000)))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(json_lines(TEXTS)))
    (tmp_path / "d.bin").write_bytes(bytes(1000))
    texts = read_texts(tmp_path)
    assert texts.size == sum(path.stat().st_size for path in tmp_path.iterdir())
    for _ in range(2):
        seen = [texts.bytes_read for _ in texts]
        assert seen == sorted(seen)
        assert (seen[0], texts.bytes_read) == (3, texts.size)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', r"not a line of JSON text"),
        (b'{"text": "\xff"}', r"can't decode byte"),
        (b'{"text": "\\ud800"}', r"surrogates not allowed"),
        (b'{"body": "a"}', r"no text under 'text' \(keys: body\)"),
        (b'{"text": 3}', r"no text under 'text'"),
        (b'["a"]', r"expected an object with a key 'text'"),
        (b"[" * 100_000, r"recursion"),
    ],
)
@pytest.mark.parametrize("packer", PACKERS)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, message, packer):
    path = tmp_path / f"d.jsonl{packer}"
    path.write_bytes(PACKERS[packer](b'{"text": "a"}\n\n' + line + b'\n{"text": "a"}\n'))
    with pytest.raises(ValueError, match=rf"d\.jsonl\{packer or '.'}?:3: .*{message}"):
        list(read_texts(path))


@pytest.mark.parametrize("packer", [".gz", ".zst"])
def test_a_packed_file_cut_short_anywhere_is_refused(tmp_path, packer):
    path = tmp_path / f"d.jsonl{packer}"
    whole = PACKERS[packer](json_lines([str(i) for i in range(20)]))
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"d\.jsonl\{packer}:\d+: cannot be unpacked.*copy"):
            list(read_texts(path))


@pytest.mark.parametrize("packer", [".gz", ".zst"])
def test_no_flipped_bit_of_a_packed_file_changes_what_is_read(tmp_path, packer):
    rng = random.Random(0)
    texts = [str(rng.random()) for _ in range(50)]
    path = tmp_path / f"d.jsonl{packer}"
    whole = PACKERS[packer](json_lines(texts))
    refused = 0
    for place in range(0, 8 * len(whole), 7):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            read = list(read_texts(path))
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert read == texts  # gzip's header holds a time stamp, which says nothing of them
    assert refused > len(whole)


def test_the_line_of_damage_is_where_reading_stopped(tmp_path):
    content = json_lines([str(i) for i in range(5)])
    path = tmp_path / "d.jsonl.zst"
    path.write_bytes(zstd(content) + zstd(content)[:-1])
    with pytest.raises(ValueError, match=r":(6|7|8|9|10|11): cannot be unpacked"):
        list(read_texts(path))


def test_a_damaged_packed_text_is_named(tmp_path):
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"abc")[:-1])
    with pytest.raises(ValueError, match=r"d.txt.gz: cannot be unpacked"):
        list(read_texts(tmp_path))


def test_a_missing_input_is_told_before_anything_is_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone: no such file or folder"):
        read_texts([tmp_path, tmp_path / "gone"])


def test_unpacking_holds_little_of_the_most_repetitive_text():
    reader = _ZstandardReader(io.BytesIO(zstd(b"0123456789" * 10_000_000)))
    buffer, total = bytearray(1 << 16), 0
    tracemalloc.start()
    while count := reader.readinto(buffer):
        total += count
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 100_000_000
    assert peak < 40_000_000
