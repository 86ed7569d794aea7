"""Batches by step: GPT-NeoX's bytes, any rows from any process, and clear refusals."""

import hashlib
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from pythia_jax.configs import DataConfig, EvaluationConfig, ModelConfig, RunConfig, TrainingConfig
from pythia_jax.data import IndexedDatasetWriter, batches
from pythia_jax.data.batches import NeoxSamples

# Made by GPT-NeoX v1.0's own code: SHA-256 of a step's rows as little-endian int32.
# Eight rows a step, 40 steps, evaluated every 10 on 2 batches.
GOLDEN = {
    "single_epoch": {
        "corpus": {"docs_seed": 7, "n_docs": 300, "lo": 3, "hi": 200},
        "train_len": 479,
        "first_tokens": [35932, 42183, 25622, 11763, 23158, 10168, 16290, 46109],
        "train": {
            0: "abc1c5a949f18d32fdc1f77c8397a4753dc2ef66a8f28e365dc6b1a8dbb43734",
            1: "f2fdd1c1406aceefba8663edf2db717af141ab0cca3bf30eb3a59ff869e55751",
            17: "dc810c3ed212af05f56d3255d7330051fb61e7266918e9202f035287c224a804",
            39: "0c4c4d642f2bba8fb8b41951444c5e4eb200799220b3c3f036236d1670d01f5d",
        },
        "validation": {
            0: "abc1c5a949f18d32fdc1f77c8397a4753dc2ef66a8f28e365dc6b1a8dbb43734",
            3: "f0bfa6e8caf8f75863a23fe02d5a161893254c5d6957d67426960b2b35810748",
        },
    },
    "multi_epoch": {
        "corpus": {"docs_seed": 8, "n_docs": 40, "lo": 3, "hi": 200},
        "train_len": 344,
        "first_tokens": [22914, 3734, 17994, 37590, 27483, 44713, 16819, 16652],
        "train": {
            0: "b462edb9392eed8b455535b82d435bf5c29fb46fc10cfa5aac3936728e7c242c",
            13: "1b71613f46a8461bb9da3c1272bd892716bc8a10f48bfa386d4f79b149065b2e",
            39: "a68309b5acfb2cb19ccf801215d526c70d5ef0ceaacc4d5330cb0824ff0c4674",
        },
        "validation": {
            0: "b804e0a0bbc1ba9fc199457a5c41cdeeeb93f89e0ef502dddd220bcc4e28f6aa",
            9: "372c4734c1f9a1688165b3aff328b2426d2693293e7a67bcdcfe96451e28774a",
        },
    },
    "seed_7": {
        "seed": 7,
        "corpus": {"docs_seed": 7, "n_docs": 300, "lo": 3, "hi": 200},
        "train_len": 479,
        "first_tokens": [29204, 7431, 30915, 39792, 22532, 21237, 33271, 16591],
        "train": {
            0: "d39fafec7ef5ad60e972ea543ce543ab4fdefdd7fae5485a937dbb5614cbb449",
            39: "80acf9bed32883b06dfc264b9f634f139b9b6be33eecb547f73e02aa690407dd",
        },
        "validation": {0: "d39fafec7ef5ad60e972ea543ce543ab4fdefdd7fae5485a937dbb5614cbb449"},
    },
    "int32_long_docs": {
        "corpus": {
            "docs_seed": 7,
            "n_docs": 12,
            "lo": 1500,
            "hi": 9000,
            "vocab": 70000,
            "dtype": "int32",
        },
        "train_len": 1095,
        "first_tokens": [62232, 13043, 16881, 46965, 7414, 38021, 58559, 32945],
        "train": {
            0: "5a394aae4bd8824c885655b3ff52dd7c41d04e135817d88dd162981ee379b0ac",
            39: "2ad1ac31f5dbab95e49e9a051d4006a6d08f40cfd240d61f6dfd5a3f3d0ddd85",
        },
        "validation": {0: "5a394aae4bd8824c885655b3ff52dd7c41d04e135817d88dd162981ee379b0ac"},
    },
    "exact_2049": {
        "sequence_length": 128,
        "corpus": {"docs_seed": 7, "n_docs": 400, "lo": 129, "hi": 129},
        "train_len": 402,
        "first_tokens": [2771, 21633, 49413, 21055, 40093, 12489, 34044, 42088],
        "train": {
            0: "f6419ee9016e094fc7342835fa3d2e9a9f6935d9d69453c5a6a608050c23d2fd",
            5: "f00600f6c46493d63483b50ae0f67ace43b48026cff6ac11681687cb825d64e7",
            39: "9a28a132503a98f0a33c2080200176aaf3d30732e81d4f99f2910dd1878c94e0",
        },
        "validation": {0: "f6419ee9016e094fc7342835fa3d2e9a9f6935d9d69453c5a6a608050c23d2fd"},
    },
}


def write_corpus(prefix, docs_seed, n_docs, lo, hi, vocab=50254, dtype="uint16", empty_every=0):
    rng = np.random.RandomState(docs_seed)
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for i in range(n_docs):
            document = rng.randint(1, vocab, size=rng.randint(lo, hi + 1))
            document[-1] = 0
            writer.add([] if empty_every and i % empty_every == 0 else document)
    return str(prefix)


def run_config(prefix, sequence_length=64, seed=1234, **data):
    paths = {"train": (prefix,), "validation": (prefix,), **data}
    return RunConfig(
        data=DataConfig(sequence_length=sequence_length, seed=seed, **paths),
        training=TrainingConfig(steps=40, batch_size=8),
        evaluation=EvaluationConfig(every=10, steps=2),
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("data") / "corpus"
    return run_config(write_corpus(prefix, docs_seed=7, n_docs=300, lo=3, hi=200))


@pytest.mark.parametrize("case", GOLDEN)
def test_batches_equal_those_of_neox(tmp_path, case):
    golden = GOLDEN[case]
    prefix = write_corpus(tmp_path / "corpus", **golden["corpus"])
    config = run_config(prefix, golden.get("sequence_length", 64), golden.get("seed", 1234))
    for split in ("train", "validation"):
        served = batches(config, split)
        digests = {
            step: hashlib.sha256(served[step].astype("<i4").tobytes()).hexdigest()
            for step in golden[split]
        }
        assert digests == golden[split]
    train = batches(config)
    assert len(train.samples) == golden["train_len"]
    assert list(train[0][0, :8]) == golden["first_tokens"]


def test_a_batch_is_int32_rows_of_sequence_length_and_one(config):
    batch = batches(config)[3]
    assert (batch.dtype, batch.shape) == (np.int32, (8, 65))


def test_rows_are_spans_of_the_shuffled_documents_even_when_many_are_empty(tmp_path):
    """Every row, found by putting whole documents end to end."""
    prefix = write_corpus(tmp_path / "c", docs_seed=3, n_docs=900, lo=1, hi=3, empty_every=2)
    train = batches(run_config(prefix, sequence_length=7))
    assert isinstance(train.samples, NeoxSamples)
    dataset, order = train.samples.dataset, train.samples.order
    stream = np.concatenate([dataset[document] for document in order.document_order])
    for step in range(len(train)):
        starts = order.shuffle[step * 8 : step * 8 + 8].astype(int) * 7
        assert np.array_equal(train[step], stream[starts[:, None] + np.arange(8)])


def test_lengths_count_the_batches_of_each_split(config):
    config = replace(config, data=replace(config.data, test=config.data.train))
    assert [len(batches(config, split)) for split in ("train", "validation", "test")] == [40, 10, 2]
    assert [batches(config, s).name for s in ("train", "validation", "test")] == [
        "train_0",
        "valid_0",
        "test_0",
    ]
    assert len(list(batches(config, "test"))) == 2


def test_test_and_validation_share_an_order(config):
    config = replace(config, data=replace(config.data, test=config.data.train))
    assert np.array_equal(batches(config, "test")[1], batches(config, "validation")[1])


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (slice(2, 5), [2, 3, 4]),
        (slice(None, None, 3), [0, 3, 6]),
        ([5, 0, 5], [5, 0, 5]),
        (np.array([7], np.uint8), [7]),
        (range(4, 8), [4, 5, 6, 7]),
        (-1, [7]),
        ([], []),
    ],
)
def test_read_gives_the_rows_asked_for(config, rows, expected):
    train = batches(config)
    assert np.array_equal(train.read(17, rows), train[17][expected])


def rows_of_process(served, step, process, processes):
    """What one process of a pod reads: every so-many-th row, so that none is contiguous."""
    return served.read(step, slice(process, None, processes))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_put_together_give_the_batch(config, processes):
    train = batches(config)
    parts = np.empty_like(train[5])
    for process in range(processes):
        parts[process::processes] = rows_of_process(batches(config), 5, process, processes)
    assert np.array_equal(parts, train[5])


def test_a_fresh_process_reads_the_same_from_a_pickle(config):
    train = batches(config)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        rows = pool.apply(rows_of_process, (train, 5, 1, 2))
    assert np.array_equal(rows, train[5][1::2])


def test_pickled_batches_and_threads_read_the_same(config):
    train = batches(config)
    expected = [train[step] for step in range(len(train))]
    copy = pickle.loads(pickle.dumps(train))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(copy.__getitem__, range(len(train))))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("step", [40, -1])
def test_a_step_out_of_range_is_an_index_error(config, step):
    with pytest.raises(IndexError, match=f"train_0: step {step} .* has 40 steps"):
        batches(config)[step]


@pytest.mark.parametrize("rows", [[8], [-9], [0.5]])
def test_rows_out_of_range_are_an_index_error(config, rows):
    with pytest.raises(IndexError, match="a batch has rows 0 to 7"):
        batches(config).read(0, rows)


@pytest.mark.parametrize(
    ("data", "split", "message"),
    [
        ({}, "test", "data.test names no dataset"),
        ({}, "valid", "no split 'valid'; the splits are train, validation, test"),
        ({"train": ("a", "b")}, "train", "data.train: 2 paths given; blending is not supported"),
        ({"split": "969,30,1"}, "train", "data.split: '969,30,1' is not supported yet"),
        ({"order": "preshuffled"}, "train", "data.order: 'preshuffled' is not supported yet"),
    ],
)
def test_what_cannot_be_served_is_refused_by_key(config, data, split, message):
    with pytest.raises(ValueError, match=message):
        batches(replace(config, data=replace(config.data, **data)), split)


def test_too_little_data_names_the_path_and_the_key(config):
    config = replace(config, data=replace(config.data, sequence_length=100_000))
    with pytest.raises(ValueError, match=r"corpus \(data.validation\): .* one sample takes 100001"):
        batches(config, "validation")


def with_vocabulary(config, vocab_size):
    model = ModelConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=vocab_size
    )
    return replace(config, model=model)


def test_dtype_too_narrow_for_the_vocabulary_is_refused(config):
    assert len(batches(with_vocabulary(config, 65536))) == 40
    with pytest.raises(ValueError, match=r"uint16 cannot hold every id of .* 65537"):
        batches(with_vocabulary(config, 65537))


def test_id_beyond_the_vocabulary_is_refused_when_read(config):
    train = batches(with_vocabulary(config, 50000))
    with pytest.raises(ValueError, match=r"id 50.* in step 0 of train_0, .* 0 to 49999"):
        train[0]
    assert batches(with_vocabulary(config, 50304))[0].max() < 50304


@pytest.mark.parametrize(
    ("dtype", "token", "message"),
    [
        ("float32", 1.0, "holds float32, not token ids"),
        ("int16", -1, "token id -1 in step"),
        ("int64", 2**40, "token id 1099511627776 in step"),
    ],
)
def test_data_that_is_no_token_ids_is_refused(tmp_path, dtype, token, message):
    with IndexedDatasetWriter(tmp_path / "data", dtype) as writer:
        writer.add([token] * 500)
    with pytest.raises(ValueError, match=message):
        batches(run_config(str(tmp_path / "data")))[0]
