"""Remote bytes equal local ones, through whatever servers do; what lasts is one clear error."""

import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import RangeServer, files_of, serving

from pythia_jax.data import links, open, remote
from pythia_jax.data.remote import merge_near, search_size
from pythia_jax.data.storage import find_tokens, open_bytes

pytestmark = pytest.mark.usefixtures("short_pauses")
CONTENT = np.random.default_rng(0).integers(0, 256, 3_000_017, np.uint8)
SHARD = 700_001  # cuts uint16 tokens in two


@pytest.fixture(scope="module")
def bad_server():
    """Every third answer is a fault: 503, 429, a dropped connection, half a body."""
    files = {**files_of("/one", CONTENT), **files_of("/cut", CONTENT, SHARD)}
    server = RangeServer(files, faults=0.3, delay=0.004, seed=1)
    with serving(server):
        yield server


@pytest.fixture
def server():
    server = RangeServer({"/one.bin": CONTENT.tobytes()})
    with serving(server):
        yield server


SPANS = st.lists(
    st.tuples(st.integers(0, len(CONTENT)), st.integers(0, 9000)), min_size=1, max_size=40
)


@pytest.mark.parametrize("name", ["one.bin", "cut-00000-of-00004.bin"])
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(spans=SPANS)
def test_any_ranges_equal_local_ones_on_a_bad_server(bad_server, name, spans):
    found = find_tokens(f"{bad_server.url}/{name}")
    starts = np.array([start for start, _ in spans])
    lengths = np.minimum([length for _, length in spans], len(CONTENT) - starts)
    expected = [CONTENT[a : a + n] for a, n in zip(starts, lengths, strict=True)]
    assert found.size == len(CONTENT)
    assert np.array_equal(found.read_ranges(starts, lengths), np.concatenate(expected))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(size=st.integers(1, 400), length=st.integers(7, 420), seed=st.integers(0, 99))
def test_shards_of_any_length_read_over_http_as_the_merged_file(server, size, length, seed):
    rng = np.random.default_rng(seed)
    content = rng.integers(0, 256, size, np.uint8)
    server.files = files_of("/p", content, length)
    starts = rng.integers(0, size + 1, 20)
    lengths = np.array([rng.integers(0, size - start + 1) for start in starts])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "NEAR", 5)
        patch.setattr(remote, "LONGEST", 40)
        found = find_tokens(f"{server.url}/p-00000-of-{size // length:05d}")
        read = found.read_ranges(starts, lengths)
    expected = [content[a : a + n] for a, n in zip(starts, lengths, strict=True)]
    assert np.array_equal(read, np.concatenate(expected))


def test_many_threads_read_a_bad_server_right(bad_server):
    found = pickle.loads(pickle.dumps(find_tokens(f"{bad_server.url}/cut-00000-of-00004")))
    with ThreadPoolExecutor(6) as pool:
        step = len(CONTENT) // 11
        parts = list(pool.map(lambda i: found.read(i * step, (i + 1) * step), range(11)))
    assert np.array_equal(np.concatenate(parts), CONTENT[: 11 * step])


def test_near_ranges_are_read_together_and_far_ones_are_not(server):
    found = open_bytes(f"{server.url}/one.bin")
    server.requests.clear()
    server.sent = 0
    starts = np.array([2_000_000, 5000, 100, 2_000_100, 1_000_000])
    found.read_ranges(starts, np.full(5, 1000))
    assert len(server.requests) == 3
    assert server.sent == 1100 + 5900 + 1000


def test_a_long_range_is_read_in_pieces_many_at_once(server, monkeypatch):
    monkeypatch.setattr(remote, "LONGEST", 50_000)
    monkeypatch.setattr(remote, "IN_FLIGHT", 16)
    server.delay = 0.1
    found = open_bytes(f"{server.url}/one.bin")
    server.busiest = 0
    assert np.array_equal(found.read(0, len(CONTENT)), CONTENT)
    assert len(server.requests) == 62
    assert 4 <= server.busiest <= 16


def test_nothing_is_asked_for_empty_ranges(server):
    found = open_bytes(f"{server.url}/one.bin")
    asked = len(server.requests)
    assert found.read_ranges(np.array([5, len(CONTENT)]), np.array([0, 0])).size == 0
    assert len(server.requests) == asked
    with pytest.raises(IndexError, match=r"one.bin: 2 bytes from 3000016 on asked for"):
        found.read(len(CONTENT) - 1, len(CONTENT) + 1)


def test_an_empty_file_is_of_no_bytes(server):
    server.files["/empty.bin"] = b""
    assert find_tokens(f"{server.url}/empty").size == 0


def test_a_server_that_ignores_ranges_is_refused_and_never_read_wrong(server):
    found = open_bytes(f"{server.url}/one.bin")
    server.honour_ranges = False
    with pytest.raises(ValueError, match=r"one.bin: the server does not serve byte ranges"):
        found.read(10, 20)
    with pytest.raises(ValueError, match=r"one.bin: the server does not serve byte ranges"):
        open_bytes(f"{server.url}/one.bin")


def test_a_server_that_gives_other_bytes_than_asked_for_is_refused(server):
    found = open_bytes(f"{server.url}/one.bin")
    server.shift = 1
    with pytest.raises(ValueError, match=r"one.bin: the server gave fewer or other bytes"):
        found.read(10, 20)
    server.shift, server.files["/one.bin"] = 0, b"short"
    with pytest.raises(ValueError, match=r"one.bin: the server gave fewer or other bytes"):
        found.read(100, 200)


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (404, FileNotFoundError, "no such file"),
        (410, FileNotFoundError, "no such file"),
        (401, PermissionError, "the server refuses to show it .HTTP 401.; check the address"),
        (403, PermissionError, "the server refuses to show it .HTTP 403."),
        (400, OSError, "the server answers HTTP 400"),
    ],
)
def test_lasting_refusals_are_told_at_once(server, status, error, message):
    url = f"{server.url}/one.bin"
    found = open_bytes(url)
    for attempt in (lambda: open_bytes(url), lambda: found.read(0, 9)):
        server.statuses["/one.bin"] = [status] * 9
        asked = len(server.requests)
        with pytest.raises(error, match=f"{url}: {message}"):
            attempt()
        assert len(server.requests) - asked <= 2


def test_faults_that_do_not_pass_are_told_with_what_was_tried(server, monkeypatch):
    monkeypatch.setattr(links, "ATTEMPTS", 2)
    url = f"{server.url}/one.bin"
    found = open_bytes(url)
    for attempt in (lambda: open_bytes(url), lambda: found.read(0, 9)):
        server.statuses["/one.bin"] = [503] * 99
        with pytest.raises(ConnectionError, match=f"{url}: cannot be read, 2 attempts failed"):
            attempt()


def test_nobody_there_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(links, "ATTEMPTS", 2)
    with pytest.raises(ConnectionError, match=r"9/x.bin: cannot be read, 2 attempts failed: .*ref"):
        open_bytes("http://127.0.0.1:9/x.bin")


def test_silence_is_asked_again(server, monkeypatch):
    found = open_bytes(f"{server.url}/one.bin")
    monkeypatch.setattr(links, "TIMEOUT_S", 0.2)
    server.statuses["/one.bin"] = [0]
    begun = time.monotonic()
    assert np.array_equal(found.read(7, 90), CONTENT[7:90])
    assert time.monotonic() - begun < 2.5


def test_http_shards_go_by_the_first_and_say_so(server):
    server.files |= files_of("/cut", CONTENT, SHARD)
    assert find_tokens(f"{server.url}/cut-00000-of-00004").size == len(CONTENT)
    with pytest.raises(FileNotFoundError, match=r"cut.bin: no such .* the name of the first, http"):
        find_tokens(f"{server.url}/cut")
    del server.files["/cut-00003-of-00004.bin"]
    with pytest.raises(FileNotFoundError, match=r"cut-00003-of-00004.bin: no such file"):
        find_tokens(f"{server.url}/cut-00000-of-00004.bin")
    server.files["/cut-00003-of-00004.bin"] = b"x"
    with pytest.raises(ValueError, match=r"cut-00003-of-00004.bin: holds 1 bytes, but the other"):
        find_tokens(f"{server.url}/cut-00000-of-00004.bin")


# The index from afar.


@pytest.fixture
def indexed(server, local_dataset):
    _, files = local_dataset
    server.files |= {f"/data{suffix}": content for suffix, content in files.items()}
    return server, f"{server.url}/data"


def test_opening_reads_a_few_bytes_of_the_index_and_none_of_the_tokens(indexed, local_dataset):
    server, prefix = indexed
    local, _ = local_dataset
    found = open(prefix)
    assert (len(found), found.num_tokens, found.dtype) == (3000, local.num_tokens, local.dtype)
    assert np.array_equal(found[1234], local[1234])
    assert "sizes" not in found.__dict__
    assert server.sent < 20_000  # pointer and size lie near each other in an index this small
    copy = pickle.loads(pickle.dumps(found))
    assert np.array_equal(copy[77], local[77])


def test_sizes_are_read_once_and_pointers_follow_from_them(indexed, local_dataset):
    server, prefix = indexed
    local, _ = local_dataset
    found = open(prefix)
    before = server.sent
    assert np.array_equal(found.sizes, local.sizes)
    assert np.array_equal(found.pointers, local.pointers)
    assert found.content_hash() == local.content_hash()
    assert server.sent - before == 4 * 3000
    assert np.array_equal(found.document_index, local.document_index)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"nonsense", "not an index of GPT-NeoX's mmap format"),
        (18, b"\x01", "truncated or damaged"),
        (34, b"\xff\xff\xff\xff", "document 0 has size -1"),
        (34, b"\x00\x00\x0f", "its sizes make .* tokens, its last pointer"),
        (34 + 4 * 2999, b"\xff\xff\xff\xff", "its last document has size -1"),
        (34 + 12 * 3000 - 8, b"\x01", "its last document has size .* and pointer"),
        (34 + 12 * 3000 - 2, b"\x01", "but its index promises"),
    ],
)
def test_damage_of_a_remote_index_is_found(indexed, offset, value, message):
    server, prefix = indexed
    content = bytearray(server.files["/data.idx"])
    content[offset : offset + len(value)] = value
    server.files["/data.idx"] = bytes(content)
    with pytest.raises(ValueError, match=message):
        _ = open(prefix).sizes


def test_a_truncated_remote_file_is_found(indexed):
    server, prefix = indexed
    server.files["/data.bin"] = server.files["/data.bin"][:-2]
    with pytest.raises(ValueError, match=r"data.bin: holds .* but its index promises"):
        open(prefix)
    server.files["/data.idx"] = server.files["/data.idx"][:20]
    with pytest.raises(ValueError, match=r"data.idx: ends inside its 34-byte header"):
        open(prefix)


# The two pure functions.


@given(size=st.one_of(st.integers(0, 100), st.integers(0, 2**49)))
def test_the_size_of_anything_is_found_in_few_rounds(size):
    rounds = []

    def has(positions):
        rounds.append(len(positions))
        return [position < size for position in positions]

    assert search_size(has) == size
    assert len(rounds) <= 14


@given(spans=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 10**5)), min_size=1))
def test_merged_ranges_hold_all_and_lie_apart(spans):
    starts, lengths = (np.array(column) for column in zip(*spans, strict=True))
    first, length, where = merge_near(starts, lengths)
    assert np.all(first[where] <= starts)
    assert np.all(starts + lengths <= (first + length)[where])
    assert np.all(first[1:] > (first + length)[:-1] + remote.NEAR)
