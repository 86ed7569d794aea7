"""Ways to remote files: redirects and links that expire, the hub, buckets, file URLs."""

import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.request import Request, urlopen

import google_storage
import numpy as np
import pytest
import tensorstore as ts
from servers import RangeServer, files_of, serving

from pythia_jax.data import open
from pythia_jax.data.remote import RemoteFiles
from pythia_jax.data.storage import find_tokens, open_bytes

pytestmark = pytest.mark.usefixtures("short_pauses")
CONTENT = np.random.default_rng(0).integers(0, 256, 3_000_017, np.uint8)
SHARD = 700_001


def test_unknown_schemes_and_bad_urls_are_refused():
    for url, message in {
        "ftp://h/a": "unknown scheme 'ftp'; a dataset may lie at a path or at gs://, s3://",
        "s3://bucket": "name a bucket and a key",
        "hf://org/repo/a": "write hf://datasets/ORG/REPO/PREFIX",
        "file://host/a": "a file on another machine",
        "https:///a": "names no server",
        "http://127.0.0.1:port/a": "nonnumeric port",
        "s3://no/a": 's3://no/a: Invalid S3 bucket name: "no"',
    }.items():
        with pytest.raises(ValueError, match=message):
            open_bytes(url)


# Links: a server that redirects every request to a second one, with a ticket that expires.


@pytest.fixture
def redirecting():
    back = RangeServer({"/one.bin": CONTENT.tobytes(), **files_of("/cut", CONTENT, SHARD)})
    back.tickets = set()
    front = RangeServer()
    front.back = back
    with serving(front, back):
        yield front, back


def test_redirects_are_followed_once_and_not_for_every_range(redirecting):
    front, _ = redirecting
    found = open_bytes(f"{front.url}/one.bin")
    for start in (0, 1_000_000, 2_000_000):
        assert np.array_equal(found.read(start, start + 999), CONTENT[start : start + 999])
    assert len(front.requests) == 1


def test_expired_links_are_renewed_while_reading(redirecting):
    front, back = redirecting
    back.expire_every = 7
    found = open_bytes(f"{front.url}/one.bin")
    starts = np.arange(0, 2_900_000, 60_000)
    expected = np.concatenate([CONTENT[a : a + 500] for a in starts])
    assert np.array_equal(found.read_ranges(starts, np.full(len(starts), 500)), expected)
    assert 4 < len(front.requests) < 40


def test_links_that_no_longer_lead_anywhere_are_one_error(redirecting):
    front, back = redirecting
    found = open_bytes(f"{front.url}/one.bin")
    back.tickets.clear()
    front.revoked = True
    asked = len(front.requests)
    with pytest.raises(PermissionError, match=r"one.bin: the server refuses to show it"):
        found.read(0, 100)
    assert len(front.requests) - asked <= 2


def test_a_file_that_changed_behind_its_link_is_refused(redirecting):
    front, back = redirecting
    found = open_bytes(f"{front.url}/one.bin")
    back.tickets.clear()
    back.files["/one.bin"] = b"another"
    with pytest.raises(ValueError, match=r"one.bin: changed while it was being read"):
        found.read(0, 5)


def test_two_threads_that_meet_an_expired_link_make_one_new_one(redirecting):
    front, back = redirecting
    found = open_bytes(f"{front.url}/one.bin")
    back.tickets.clear()
    asked = len(front.requests)
    begin = threading.Barrier(4)

    def read(_):
        begin.wait()
        return found.read(0, 1000)

    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(read, range(4)))
    assert all(np.array_equal(part, CONTENT[:1000]) for part in parts)
    assert len(front.requests) == asked + 1


# The Hugging Face Hub, as far as the reader uses it.


@pytest.fixture
def hub(redirecting, local_dataset, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    front, back = redirecting
    monkeypatch.setenv("HF_ENDPOINT", front.url)
    _, files = local_dataset
    back.files |= files_of("/set/data", files[".bin"], 100_001)
    back.files |= {"/set/data.idx": files[".idx"], "/flat.bin": b"abc"}
    return front, back


def test_a_dataset_on_the_hub_reads_as_the_local_one(hub, local_dataset):
    front, back = hub
    back.expire_every = 11
    local, _ = local_dataset
    found = open("hf://datasets/org/repo/set/data")
    assert np.array_equal(found.sizes, local.sizes)
    starts = np.arange(0, local.num_tokens - 3000, 9001)
    lengths = np.full(len(starts), 2049)
    assert np.array_equal(found.read_spans(starts, lengths), local.read_spans(starts, lengths))
    assert np.array_equal(found[2999], local[2999])
    assert all("resolve/main" in path or "tree/main" in path for _, path, _ in front.requests)


def test_the_hub_is_listed_once_for_a_set_of_shards(hub):
    front, _ = hub
    find_tokens("hf://datasets/org/repo/set/data")
    assert len(front.requests) == 1
    find_tokens("hf://datasets/org/repo@v1/set/data-00000-of-00012.bin")
    assert front.requests[-1][1].startswith("/api/datasets/org/repo/tree/v1/set")
    assert find_tokens("hf://datasets/org/repo/flat").size == 3


def test_the_token_goes_to_the_hub_and_not_to_where_it_sends_us(hub, monkeypatch):
    front, back = hub
    front.token = "hf_secret"
    with pytest.raises(PermissionError, match=r"hf://.*/set/data: the hub refuses .*HF_TOKEN"):
        find_tokens("hf://datasets/org/repo/set/data")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    seen = []
    monkeypatch.setattr(
        back.RequestHandlerClass,
        "has_ticket",
        lambda self, _: seen.append(self.headers.get("Authorization")) or True,
    )
    found = find_tokens("hf://datasets/org/repo/set/data")
    assert found.read(0, 10).size == 10
    assert seen == [None]


def test_what_is_not_on_the_hub_is_named(hub):
    with pytest.raises(FileNotFoundError, match=r"repo/set/gone.bin: no such file, and no shards"):
        find_tokens("hf://datasets/org/repo/set/gone")
    with pytest.raises(FileNotFoundError, match=r"repo/gone/x.bin: no such file, and no shards"):
        find_tokens("hf://datasets/org/repo/gone/x")
    with pytest.raises(FileNotFoundError, match=r"repo/set/gone.idx: not on the hub"):
        open_bytes("hf://datasets/org/repo/set/gone.idx")
    with pytest.raises(FileNotFoundError, match=r"hf://datasets/org/none/x: not on the hub"):
        find_tokens("hf://datasets/org/none/x")


def test_a_missing_shard_on_the_hub_is_named_before_anything_is_read(hub):
    _, back = hub
    del back.files["/set/data-00003-of-00012.bin"]
    with pytest.raises(FileNotFoundError, match=r"data-00003-of-00012.bin: no such file; 1 of the"):
        find_tokens("hf://datasets/org/repo/set/data")
    assert len(back.requests) == 0


def test_without_huggingface_hub_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RuntimeError, match=r"hf://.* needs huggingface_hub: .*pythia-jax\[hf\]"):
        find_tokens("hf://datasets/org/repo/set/data")


def test_links_of_many_shards_are_resolved_at_once(hub):
    front, _ = hub
    found = find_tokens("hf://datasets/org/repo/set/data")
    front.delay, front.busiest = 0.2, 0
    found.read(0, found.size)
    assert front.busiest > 3


def test_offline_mode_is_respected(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="offline mode is enabled"):
        find_tokens("hf://datasets/org/repo/set/data")


# Buckets.


@pytest.fixture(scope="module")
def s3(local_dataset):
    moto_server = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
        }.items():
            patch.setenv(name, value)
        urlopen(Request(f"http://{host}:{port}/bucket1", method="PUT")).close()
        spec = {"driver": "s3", "bucket": "bucket1", "endpoint": f"http://{host}:{port}"}
        store = ts.KvStore.open({**spec, "aws_region": "us-east-1"}).result()
        _, files = local_dataset
        objects = {
            **files_of("pile/one", files[".bin"]),
            **files_of("pile/data", files[".bin"], 200_001),
            "pile/data.idx": files[".idx"],
            "pile/one.idx": files[".idx"],
            "empty.bin": b"",
        }
        for key, content in objects.items():
            store.write(key, content).result()
        yield store
    server.stop()


@pytest.mark.parametrize("name", ["one", "data", "data-00000-of-00006"])
def test_a_dataset_in_a_bucket_reads_as_the_local_one(s3, local_dataset, name):
    local, _ = local_dataset
    found = open(f"s3://bucket1/pile/{name}")
    assert found.content_hash() == local.content_hash()
    assert np.array_equal(found.pointers, local.pointers)
    starts = np.arange(0, local.num_tokens - 3000, 40_001)
    lengths = np.full(len(starts), 2049)
    assert np.array_equal(found.read_spans(starts, lengths), local.read_spans(starts, lengths))


def test_what_is_not_in_a_bucket_is_named(s3):
    with pytest.raises(FileNotFoundError, match=r"s3://bucket1/pile/gone.bin: no such file"):
        find_tokens("s3://bucket1/pile/gone")
    with pytest.raises(FileNotFoundError, match=r"s3://bucket1/pile/gone.idx: no such file"):
        open_bytes("s3://bucket1/pile/gone.idx")
    assert find_tokens("s3://bucket1/empty").size == 0


def test_an_object_that_shrinks_is_a_clear_error(s3):
    s3.write("shrinks.bin", bytes(1000)).result()
    found = find_tokens("s3://bucket1/shrinks")
    assert found.size == 1000
    s3.write("shrinks.bin", bytes(10)).result()
    with pytest.raises(ValueError, match=r"shrinks.bin: the server gave fewer or other bytes"):
        found.read(500, 1000)


def test_google_storage_reads_as_local(local_dataset, monkeypatch):
    """Against a stand-in on this machine."""
    local, files = local_dataset
    server = google_storage.running()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    objects = {**files_of("p/data", files[".bin"], 200_001), "p/data.idx": files[".idx"]}
    for key, content in objects.items():
        server.put("bucket1", key, content)
    found = open("gs://bucket1/p/data")
    assert np.array_equal(found.sizes, local.sizes)
    assert np.array_equal(found[2000], local[2000])
    with pytest.raises(FileNotFoundError, match=r"gs://bucket1/p/gone.bin: no such file"):
        find_tokens("gs://bucket1/p/gone")


def test_file_urls_read_as_paths(local_dataset, tmp_path):
    local, files = local_dataset
    for name, content in files_of("/a b", files[".bin"], 99_999).items():
        (tmp_path / name[1:]).write_bytes(content)
    (tmp_path / "a b.idx").write_bytes(files[".idx"])
    found = open(f"file://{tmp_path}/a%20b")
    assert isinstance(found.data, RemoteFiles)
    assert np.array_equal(
        found.read_spans(np.array([7]), np.array([300_000])), local.tokens[7:300_007]
    )
    with pytest.raises(FileNotFoundError, match=r"gone.bin: no such file, and no shards"):
        find_tokens(f"file://{tmp_path}/gone")
