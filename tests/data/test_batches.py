"""Batches by step: GPT-NeoX's bytes, any rows from any process, and clear refusals."""

import hashlib
import json
import multiprocessing
import operator
import pickle
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import reduce
from pathlib import Path

import brute_force
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pythia_jax.configs import DataConfig, EvaluationConfig, ModelConfig, RunConfig, TrainingConfig
from pythia_jax.data import IndexedDatasetWriter, batches
from pythia_jax.data.batches import samples
from pythia_jax.data.samples import NeoxSamples

# Made by GPT-NeoX v1.0's own code: SHA-256 of a step's rows as little-endian int32.
# Eight rows a step, 40 steps, evaluated every 10 on 2 batches.
GOLDEN = {
    "single_epoch": {
        "corpora": [{"docs_seed": 7, "n_docs": 300, "lo": 3, "hi": 200}],
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
        "corpora": [{"docs_seed": 8, "n_docs": 40, "lo": 3, "hi": 200}],
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
        "corpora": [{"docs_seed": 7, "n_docs": 300, "lo": 3, "hi": 200}],
        "train_len": 479,
        "first_tokens": [29204, 7431, 30915, 39792, 22532, 21237, 33271, 16591],
        "train": {
            0: "d39fafec7ef5ad60e972ea543ce543ab4fdefdd7fae5485a937dbb5614cbb449",
            39: "80acf9bed32883b06dfc264b9f634f139b9b6be33eecb547f73e02aa690407dd",
        },
        "validation": {0: "d39fafec7ef5ad60e972ea543ce543ab4fdefdd7fae5485a937dbb5614cbb449"},
    },
    "int32_long_docs": {
        "corpora": [
            {
                "docs_seed": 7,
                "n_docs": 12,
                "lo": 1500,
                "hi": 9000,
                "vocab": 70000,
                "dtype": "int32",
            }
        ],
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
        "corpora": [{"docs_seed": 7, "n_docs": 400, "lo": 129, "hi": 129}],
        "train_len": 402,
        "first_tokens": [2771, 21633, 49413, 21055, 40093, 12489, 34044, 42088],
        "train": {
            0: "f6419ee9016e094fc7342835fa3d2e9a9f6935d9d69453c5a6a608050c23d2fd",
            5: "f00600f6c46493d63483b50ae0f67ace43b48026cff6ac11681687cb825d64e7",
            39: "9a28a132503a98f0a33c2080200176aaf3d30732e81d4f99f2910dd1878c94e0",
        },
        "validation": {0: "f6419ee9016e094fc7342835fa3d2e9a9f6935d9d69453c5a6a608050c23d2fd"},
        "data": {"order": "neox"},  # data like this would be refused otherwise
    },
    "blend": {
        "corpora": [
            {"docs_seed": 1, "n_docs": 300, "lo": 3, "hi": 200},
            {"docs_seed": 2, "n_docs": 120, "lo": 3, "hi": 200},
        ],
        "data": {"train_weights": (0.7, 0.3), "validation_weights": (0.7, 0.3)},
        "train_len": 652,
        "first_tokens": [29382, 8978, 23071, 47226, 9506, 6970, 142, 3459],
        "train": {
            0: "fed25610e88ace0dfb089c16e6f3b9fb45fa26ce9ae10d648f6863271f05dd58",
            20: "1f4d03828355c1919d93ec0c400156b843b90084a9f4e2b50d4ab00bcbee5b37",
            39: "469260e04a4b17a007104ac3fc8af1a46feb60f237fd2d6a2e365a646cde1474",
        },
        "validation": {1: "cfca6c4e368021f979cada1689b65ec6dd0a873bf00e945c5c619619d32f3079"},
    },
    "split": {
        "corpora": [{"docs_seed": 11, "n_docs": 1000, "lo": 3, "hi": 200}],
        "data": {"split": "969,30,1", "validation": ()},
        "train_len": 1588,
        "first_tokens": [31083, 5846, 2024, 48280, 2765, 46190, 45616, 9470],
        "train": {
            0: "badd0e72b80137977a3e139f90b6e2c4b6ccc9d3e51546dae209d7670df35626",
            39: "92b318bb1b5d12a4c01fdc2f3d5d5160991ab3e6f49bfc802a7d99fe6b907041",
        },
        "validation": {
            0: "f1a7c6ce6ba3d7b470832323be3e9cd1028b9beda3117a98b440f82ed9633e22",
            4: "622b737d4739703aafad12b1284c83d72794565be17eb3ada26920b1154f3f99",
        },
    },
}


def sha256(rows):
    return hashlib.sha256(rows.astype("<i4").tobytes()).hexdigest()


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


def golden_config(golden, folder):
    paths = [write_corpus(folder / f"c{i}", **corpus) for i, corpus in enumerate(golden["corpora"])]
    settings = {"train": paths, "validation": paths, **golden.get("data", {})}
    return run_config(
        paths[0], golden.get("sequence_length", 64), golden.get("seed", 1234), **settings
    )


@pytest.mark.parametrize("case", GOLDEN)
def test_batches_equal_those_of_neox(tmp_path, case):
    golden = GOLDEN[case]
    config = golden_config(golden, tmp_path)
    for split in ("train", "validation"):
        served = batches(config, split)
        assert {step: sha256(served[step]) for step in golden[split]} == golden[split]
    train = batches(config)
    assert len(train.samples) == golden["train_len"]
    assert list(train[0][0, :8]) == golden["first_tokens"]


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("case", ["single_epoch", "blend", "split"])
def test_processes_put_together_give_the_batch_of_neox(tmp_path, case, processes):
    """Each reads rows that are not contiguous, from a config of its own."""
    golden = GOLDEN[case]
    config = golden_config(golden, tmp_path)
    for step, digest in golden["train"].items():
        parts = np.empty((8, 65), np.int32)
        for process in range(processes):
            parts[process::processes] = rows_of_process(batches(config), step, process, processes)
        assert sha256(parts) == digest


SHARED = Path(__file__).parents[3] / "shared" / "golden" / "data_order.json"


@pytest.mark.skipif(not SHARED.exists(), reason="needs the folder beside the repository")
def test_the_goldens_written_out_here_are_those_of_the_project():
    for name, golden in json.loads(SHARED.read_text()).items():
        for ours, theirs in (("train", "train"), ("validation", "valid")):
            found = {str(step): digest for step, digest in GOLDEN[name][ours].items()}
            assert found == golden["expect"][theirs]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    weights=st.lists(st.sampled_from([0.1, 0.3, 1.0, 2.0, 7.0, 1e-3]), min_size=1, max_size=4),
    dtypes=st.lists(st.sampled_from(["u1", "i1", "i2", "u2", "i4", "i8"]), min_size=4, max_size=4),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 5)),
    documents=st.integers(1, 30),
    given_weights=st.booleans(),
)
def test_any_blend_equals_plain_loops(seed, weights, dtypes, shape, documents, given_weights):
    length, steps, batch = shape
    corpora = [
        [*brute_force.corpus(seed + i, documents + i, 9), [1] * (2 * length + 2)]
        for i in range(len(weights))
    ]
    weights = weights if given_weights else [1.0] * len(weights)
    shares = [weight / reduce(operator.add, weights) for weight in weights]
    members = [
        brute_force.one_path(
            corpus, brute_force.wanted(steps, batch, share), length, seed, source=i
        )
        for i, (corpus, share) in enumerate(zip(corpora, shares, strict=True))
    ]
    expected = brute_force.rows_of(brute_force.blended(members, shares), steps, batch)
    with tempfile.TemporaryDirectory() as folder:
        paths = [
            brute_force.write(Path(folder) / str(i), corpus, dtype)
            for i, (corpus, dtype) in enumerate(zip(corpora, dtypes, strict=False))
        ]
        config = brute_force.config(
            length,
            steps,
            batch,
            seed,
            train=tuple(paths),
            train_weights=tuple(weights) if given_weights else None,
            order="neox",
        )
        train = batches(config)
        assert len(train) == steps
        for step in range(steps):
            assert train[step].tolist() == [[seen.token for seen in row] for row in expected[step]]
            pieces = zip(*map(list, train.pieces(step)), strict=True)
            assert [brute_force.Run(*piece) for piece in pieces] == brute_force.runs(expected[step])
        seen = {
            (step, row, token.source, token.document)
            for step, rows in enumerate(expected)
            for row, sample in enumerate(rows)
            for token in sample
        }
        for source, corpus in enumerate(corpora):
            for document in range(len(corpus)):
                places = sorted((s, r) for s, r, *which in seen if which == [source, document])
                found = train.steps_of_document(document, source)
                assert list(map(tuple, found.tolist())) == places


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shares=st.tuples(*[st.integers(1, 9)] * 3),
    between=st.sampled_from([",", "/", ", "]),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 12), st.integers(1, 5)),
)
def test_any_split_equals_plain_loops(seed, shares, between, shape):
    length, steps, batch = shape
    corpus = [[*document, 1, 2, 3, 4] for document in brute_force.corpus(seed, 40, 30)]
    split = between.join(map(str, shares))
    with tempfile.TemporaryDirectory() as folder:
        path = brute_force.write(Path(folder) / "corpus", corpus)
        config = brute_force.config(length, steps, batch, seed, train=(path,), split=split)
        bounds = [0, *np.cumsum([round(share / sum(shares) * 40) for share in shares])]
        bounds = [0, *(bound - (bounds[-1] - 40) for bound in bounds[1:])]
        for number, name in enumerate(("train", "validation", "test")):
            served = batches(config, name)
            assert served.name == ("train", "valid", "test")[number]
            wanted = len(served) * batch
            chosen = range(bounds[number], bounds[number + 1])
            samples = brute_force.served(
                brute_force.one_path(corpus, wanted, length, seed, chosen=chosen)
            )
            rows = brute_force.rows_of(samples, len(served), batch)
            found = [served[step].tolist() for step in range(len(served))]
            assert found == [[[seen.token for seen in row] for row in step] for step in rows]


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
        ({"split": "1,0,0", "validation": ()}, "test", "'1,0,0' leaves no documents for test of"),
    ],
)
def test_what_cannot_be_served_is_refused_by_key(config, data, split, message):
    with pytest.raises(ValueError, match=message):
        batches(replace(config, data=replace(config.data, **data)), split)


def test_data_that_looks_shuffled_already_is_refused_unless_the_order_is_given(tmp_path):
    prefix = write_corpus(tmp_path / "rows", docs_seed=1, n_docs=400, lo=65, hi=65)
    config = run_config(prefix)
    with pytest.raises(
        ValueError, match=r"rows \(data.train\): every document has 65 tokens"
    ) as info:
        batches(config)
    assert "'preshuffled' to read the rows as they lie" in str(info.value)
    assert "'neox' to shuffle them" in str(info.value)
    assert len(batches(replace(config, data=replace(config.data, order="neox")))) == 40
    assert len(batches(replace(config, data=replace(config.data, sequence_length=63)))) == 40


def test_one_other_size_is_enough_to_be_no_shuffled_data(tmp_path):
    with IndexedDatasetWriter(tmp_path / "data", "uint16") as writer:
        for size in (*[65] * 400, 64):
            writer.add([1] * size)
    assert len(batches(run_config(str(tmp_path / "data")))) == 40


def test_a_missing_index_tells_of_preshuffled_data(config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"set data\.order to preshuffled"):
        batches(replace(config, data=replace(config.data, train=(str(tmp_path / "none"),))))


def test_preshuffled_rows_are_served_as_they_lie(tmp_path):
    rows = np.random.RandomState(0).randint(1, 999, (330, 65)).astype("<u2")
    rows.tofile(tmp_path / "rows.bin")
    config = run_config(str(tmp_path / "rows"), order="preshuffled", validation=())
    train = batches(config)
    assert train.name == "train_0"
    assert np.array_equal(np.concatenate(list(train)), rows[:320])
    with pytest.raises(ValueError, match="330 preshuffled rows, enough for 41 steps"):
        batches(replace(config, training=replace(config.training, steps=42)))


def test_samples_are_served_one_by_one(config):
    served = samples(config)
    assert len(served) == 479
    assert np.array_equal(served[8 * 17 + 3], batches(config)[17][3])
    assert np.array_equal(served[-1], served[478])
    assert np.array_equal(served.read(np.array([479, 480])), served.read(np.array([0, 1])))
    for index in (479, -480):
        with pytest.raises(IndexError, match="there are 479"):
            served[index]


@pytest.mark.parametrize(("document", "source"), [(300, 0), (-1, 0), (0, 1)])
def test_a_document_or_path_that_is_not_there_is_an_index_error(config, document, source):
    with pytest.raises(IndexError, match="asked for, but there are"):
        batches(config).steps_of_document(document, source)


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
