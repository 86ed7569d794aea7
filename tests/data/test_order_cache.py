"""Orders on disk: the right one or none, whoever asks at the same time, whatever breaks."""

import errno
import logging
import multiprocessing
import os
import pickle
import shutil

import numpy as np
import pytest

from pythia_jax.data import IndexedDatasetWriter, open_dataset, order_cache
from pythia_jax.data.order_cache import cached_order
from pythia_jax.data.sample_order import build_sample_order

SIZES = np.random.RandomState(0).randint(0, 90, size=300)
WANTED, LENGTH, SEED = 300, 16, 5
ARRAYS = ("document_order", "sample_index", "shuffle")


def write_dataset(prefix, sizes=SIZES, token=1):
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        writer.add_documents(np.full(sum(sizes), token), sizes)
    return open_dataset(prefix)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHIA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(order_cache, "SMALLEST_CACHED", 0)
    return tmp_path / "cache" / "orders"


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(tmp_path / "corpus")


def entries(folder):
    return sorted(path for path in folder.iterdir() if path.is_dir())


def assert_equal(found, expected):
    for name in ARRAYS:
        one, other = getattr(found, name), getattr(expected, name)
        assert one.dtype == other.dtype and np.array_equal(one, other)
    assert (found.epochs, found.sequence_length) == (expected.epochs, expected.sequence_length)


def expected_order(sizes=SIZES):
    return build_sample_order(np.asarray(sizes, np.int32), WANTED, LENGTH, SEED)


def must_not_build(*_):
    raise AssertionError("built although it lies in the cache")


def test_a_second_call_maps_what_the_first_built(dataset, folder, monkeypatch):
    assert_equal(cached_order(dataset, WANTED, LENGTH, SEED), expected_order())
    monkeypatch.setattr(order_cache, "build_sample_order", must_not_build)
    found = cached_order(dataset, WANTED, LENGTH, SEED)
    assert_equal(found, expected_order())
    assert isinstance(found.shuffle.base, np.memmap)
    assert not found.shuffle.flags.writeable


def test_a_mapped_order_pickles_as_its_place(dataset, folder):
    found = cached_order(dataset, WANTED, LENGTH, SEED)
    pickled = pickle.dumps(found)
    assert len(pickled) < 1000
    assert_equal(pickle.loads(pickled), expected_order())


def test_small_orders_are_not_kept(dataset, folder, monkeypatch):
    monkeypatch.setattr(order_cache, "SMALLEST_CACHED", 10**6)
    assert_equal(cached_order(dataset, WANTED, LENGTH, SEED), expected_order())
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "entries_then"),
    [
        ((WANTED - 1, LENGTH, SEED), 1),  # as many epochs: the same order
        ((10 * WANTED, LENGTH, SEED), 2),
        ((WANTED, LENGTH + 1, SEED), 2),
        ((WANTED, LENGTH, SEED + 1), 2),
        ((WANTED, LENGTH, SEED, range(10, 300)), 2),
        ((WANTED, LENGTH, SEED, range(0, 300)), 1),
    ],
)
def test_what_decides_the_order_decides_the_entry(dataset, folder, arguments, entries_then):
    cached_order(dataset, WANTED, LENGTH, SEED)
    wanted, length, seed, *chosen = arguments
    found = cached_order(dataset, wanted, length, seed, *chosen)
    assert len(entries(folder)) == entries_then
    numbers = np.array(chosen[0]) if chosen else None
    assert_equal(found, build_sample_order(dataset.sizes, wanted, length, seed, numbers))


def test_other_data_under_the_old_name_has_another_order(dataset, folder, tmp_path):
    """The same number of documents and tokens, in another order: the index decides."""
    cached_order(dataset, WANTED, LENGTH, SEED)
    other = write_dataset(tmp_path / "corpus", SIZES[::-1])
    assert_equal(cached_order(other, WANTED, LENGTH, SEED), expected_order(SIZES[::-1]))
    assert len(entries(folder)) == 2


def test_the_same_data_elsewhere_has_the_same_order(dataset, folder, tmp_path):
    cached_order(dataset, WANTED, LENGTH, SEED)
    moved = write_dataset(tmp_path / "moved" / "corpus")
    cached_order(moved, WANTED, LENGTH, SEED)
    assert len(entries(folder)) == 1


def truncate(entry):
    with (entry / "shuffle.npy").open("r+b") as file:
        file.truncate(200)


def empty(entry):
    (entry / "sample_index.npy").write_bytes(b"")


def overwrite(entry):
    with (entry / "document_order.npy").open("r+b") as file:
        file.seek(300)
        file.write(b"\xff\xff\xff\xff")


def remove_array(entry):
    (entry / "shuffle.npy").unlink()


def swap(entry):
    shutil.copy(entry / "shuffle.npy", entry / "document_order.npy")


def spoil_manifest(entry):
    (entry / "manifest.json").write_text("[]")


def remove_manifest(entry):
    (entry / "manifest.json").unlink()


@pytest.mark.parametrize(
    "damage",
    [truncate, empty, overwrite, remove_array, swap, spoil_manifest, remove_manifest],
)
def test_a_damaged_entry_is_built_again_and_said_so(dataset, folder, caplog, damage):
    cached_order(dataset, WANTED, LENGTH, SEED)
    (entry,) = entries(folder)
    damage(entry)
    with caplog.at_level(logging.WARNING):
        assert_equal(cached_order(dataset, WANTED, LENGTH, SEED), expected_order())
    assert "is damaged and is built again" in caplog.text
    caplog.clear()
    assert_equal(cached_order(dataset, WANTED, LENGTH, SEED), expected_order())
    assert not caplog.records


def test_what_a_killed_builder_left_is_cleared_away(dataset, folder):
    cached_order(dataset, WANTED, LENGTH, SEED)
    (entry,) = entries(folder)
    entry.rename(entry.with_suffix(".partial"))
    assert_equal(cached_order(dataset, WANTED, LENGTH, SEED), expected_order())
    assert entries(folder) == [entry]


def test_a_full_disk_costs_a_warning_and_leaves_nothing(dataset, folder, caplog, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert_equal(cached_order(dataset, WANTED, LENGTH, SEED), expected_order())
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left" in caplog.text
    assert entries(folder) == []


def test_a_folder_that_cannot_be_made_costs_a_warning(dataset, folder, caplog, monkeypatch):
    folder.parent.write_text("a file where the folder should be")
    assert_equal(cached_order(dataset, WANTED, LENGTH, SEED), expected_order())
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_the_folder_is_that_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("PYTHIA_JAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert order_cache.cache_folder() == tmp_path / ".cache" / "pythia_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert order_cache.cache_folder() == tmp_path / "xdg" / "pythia_jax"
    monkeypatch.setenv("PYTHIA_JAX_CACHE", str(tmp_path / "own"))
    assert order_cache.cache_folder() == tmp_path / "own"


def build_and_count(prefix, ready, builds):
    """One of several processes that start at once; counts those that build."""
    build = order_cache.build_sample_order

    def counted(*arguments):
        with builds.get_lock():
            builds.value += 1
        return build(*arguments)

    order_cache.SMALLEST_CACHED = 0
    order_cache.build_sample_order = counted
    dataset = open_dataset(prefix)
    ready.wait()
    assert_equal(cached_order(dataset, WANTED, LENGTH, SEED), expected_order())


def test_of_processes_that_start_at_once_one_builds(dataset, folder):
    context = multiprocessing.get_context("spawn")
    ready, builds = context.Barrier(4), context.Value("i", 0)
    processes = [
        context.Process(target=build_and_count, args=(dataset.prefix, ready, builds))
        for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert builds.value == 1
    assert len(entries(folder)) == 1


def test_without_a_home_an_order_is_built_in_memory(dataset, monkeypatch, caplog):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(order_cache, "SMALLEST_CACHED", 0)
    monkeypatch.setattr(order_cache, "cache_folder", no_home)
    order = cached_order(dataset, WANTED, LENGTH, SEED)
    assert np.array_equal(order.shuffle, build_sample_order(SIZES, WANTED, LENGTH, SEED).shuffle)
    assert "PYTHIA_JAX_CACHE" in caplog.text


def test_an_entry_under_a_foreign_name_is_not_taken(folder, dataset):
    first = cached_order(dataset, WANTED, LENGTH, SEED)
    (entry,) = entries(folder)
    second = cached_order(dataset, WANTED, LENGTH, SEED + 1)
    (other,) = set(entries(folder)) - {entry}
    shutil.rmtree(other)
    shutil.copytree(entry, other)
    again = cached_order(dataset, WANTED, LENGTH, SEED + 1)
    assert np.array_equal(again.shuffle, second.shuffle)
    assert not np.array_equal(again.shuffle, first.shuffle)
