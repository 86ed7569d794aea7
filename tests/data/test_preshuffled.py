"""Preshuffled rows: read as they lie, from shards cut anywhere, traced back to their documents."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from brute_force import (
    Sample,
    config,
    corpus,
    one_path,
    rows_of,
    runs,
    wanted,
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import RangeServer, serving

from pythia_jax.configs import ModelConfig, RunConfig
from pythia_jax.data import batches
from pythia_jax.data.find import Match, find, sightings
from pythia_jax.data.preshuffled import DocumentsUnknown, PreshuffledSamples
from pythia_jax.data.sample_order import samples_to_draw
from pythia_jax.data.view import view

STEPS, BATCH = 9, 4


def preshuffle(
    folder: Path, documents: list[list[int]], dtype: str = "uint16", **settings: int
) -> tuple[RunConfig, list[Sample]]:
    """A run on rows written in the order they are served; and the rows, token by token."""
    neox = config(steps=STEPS, batch_size=BATCH, **settings)
    number, data = STEPS * BATCH, neox.data
    order = one_path(documents, wanted(STEPS, BATCH), data.sequence_length, data.seed)
    rows = [[seen.token for seen in order[i]] for i in range(number)]
    np.array(rows, dtype).tofile(folder / "rows.bin")
    prefix = str(folder / "rows")
    return replace(neox, data=replace(data, train=(prefix,), order="preshuffled")), order[:number]


def with_documents(settings: RunConfig, documents: list[list[int]], folder: Path) -> RunConfig:
    """The same run told of its documents, of which the index alone is left."""
    prefix = write(folder / "documents", documents)
    Path(f"{prefix}.bin").unlink()
    return replace(settings, data=replace(settings.data, documents=prefix))


def cut(folder: Path, shard_bytes: int) -> str:
    """The tokens at `rows.bin` as a shard set and nothing else."""
    whole = (folder / "rows.bin").read_bytes()
    parts = [whole[i : i + shard_bytes] for i in range(0, len(whole), shard_bytes)]
    for i, part in enumerate(parts):
        (folder / f"cut-{i:05d}-of-{len(parts) - 1:05d}.bin").write_bytes(part)
    return str(folder / "cut")


@pytest.fixture(params=[60, 9], ids=["one epoch", "several epochs"])
def documents(request: pytest.FixtureRequest) -> list[list[int]]:
    return corpus(request.param, request.param, 20)


def test_step_t_is_rows_batch_size_t_on_as_they_lie(
    documents: list[list[int]], tmp_path: Path
) -> None:
    run, rows = preshuffle(tmp_path, documents)
    served = batches(run)
    expected = [
        [[seen.token for seen in row] for row in step] for step in rows_of(rows, STEPS, BATCH)
    ]
    assert [served[step].tolist() for step in range(STEPS)] == expected
    assert served.read(4, [3, 0, 0]).tolist() == [expected[4][row] for row in (3, 0, 0)]
    assert pickle.loads(pickle.dumps(served)).read(2, slice(None)).tolist() == expected[2]


def test_rows_are_traced_to_their_documents_by_the_unshuffled_index_alone(
    documents: list[list[int]], tmp_path: Path
) -> None:
    run, rows = preshuffle(tmp_path, documents)
    served = batches(with_documents(run, documents, tmp_path))
    for step, expected in enumerate(rows_of(rows, STEPS, BATCH)):
        assert list(zip(*map(np.ndarray.tolist, served.pieces(step)), strict=True)) == runs(
            expected
        )
    for number in range(len(documents)):
        places = [
            divmod(i, BATCH)
            for i, row in enumerate(rows)
            if any(seen.document == number for seen in row)
        ]
        assert [tuple(place) for place in served.steps_of_document(number).tolist()] == places


def test_batches_pieces_and_sightings_equal_those_of_the_order_they_were_made_from(
    documents: list[list[int]], tmp_path: Path
) -> None:
    run, _ = preshuffle(tmp_path, documents)
    run = with_documents(run, documents, tmp_path)
    prefix = write(tmp_path / "unshuffled", documents)
    neox = replace(run, data=replace(run.data, train=(prefix,), order="neox", documents=None))
    lying, ordered = batches(run), batches(neox)
    for step in range(STEPS):
        np.testing.assert_array_equal(lying[step], ordered[step])
        np.testing.assert_array_equal(lying.pieces(step), ordered.pieces(step))
        told = [view(served, step).split("\n\n", 1)[1] for served in (lying, ordered)]
        assert told[0] == told[1]
    for number in range(len(documents)):
        assert list(sightings(lying, number)) == list(sightings(ordered, number))


@settings(deadline=None, max_examples=25)
@given(shard_bytes=st.integers(1, 36 * 16 + 1))
def test_shards_cut_anywhere_read_as_one_file(
    shard_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Rows and single tokens straddle the borders."""
    folder = tmp_path_factory.mktemp("cut")
    documents = corpus(60, 60, 20)
    run, _ = preshuffle(folder, documents)
    whole = batches(run)
    sharded = batches(replace(run, data=replace(run.data, train=(cut(folder, shard_bytes),))))
    for step in range(STEPS):
        np.testing.assert_array_equal(sharded[step], whole[step])
    sequence = whole[5][2, 3:6]
    assert Match(5, 2, 3) in list(find(sharded, sequence)) == list(find(whole, sequence))


def test_without_an_index_the_vocabulary_decides_the_type(tmp_path: Path) -> None:
    documents = [[token + 70_000 for token in document] for document in corpus(60, 60, 20)]
    run, rows = preshuffle(tmp_path, documents, "int32")
    model = ModelConfig(64, 1, 1, vocab_size=80_000)
    served = batches(replace(run, model=model))
    assert served[0].tolist() == [[seen.token for seen in row] for row in rows[:BATCH]]


def index_of_rows(run: RunConfig, sizes: list[int], dtype: str) -> None:
    """An index beside the rows that says what the test wants it to."""
    (prefix,) = run.data.train
    write(Path(prefix).with_name("other"), [[0] * size for size in sizes], dtype)
    Path(prefix).with_name("other.idx").rename(f"{prefix}.idx")


def test_an_index_gives_the_type(tmp_path: Path) -> None:
    run, rows = preshuffle(tmp_path, corpus(60, 60, 20), "int32")
    index_of_rows(run, [8] * STEPS * BATCH, "int32")
    assert batches(run)[0].tolist() == [[seen.token for seen in row] for row in rows[:BATCH]]


@pytest.mark.parametrize(
    "sizes", [[7, 9] + [8] * 34, [8] * 35 + [7], [8] * 35, [8] * 34 + [16], [4] * 72]
)
def test_an_index_of_other_sizes_is_refused(sizes: list[int], tmp_path: Path) -> None:
    run, _ = preshuffle(tmp_path, corpus(60, 60, 20))
    index_of_rows(run, sizes, "uint16")
    with pytest.raises(ValueError, match=r"rows\.idx: .* not .*of 8 tokens"):
        batches(run)


def test_an_index_of_a_type_that_is_no_token_ids_is_refused(tmp_path: Path) -> None:
    run, _ = preshuffle(tmp_path, corpus(60, 60, 20), "float32")
    index_of_rows(run, [8] * STEPS * BATCH, "float32")
    with pytest.raises(ValueError, match="float32, not token ids"):
        batches(run)


def test_tokens_that_are_not_whole_rows_are_refused_with_the_sizes(tmp_path: Path) -> None:
    run, _ = preshuffle(tmp_path, corpus(60, 60, 20))
    with (tmp_path / "rows.bin").open("ab") as file:
        file.write(b"abc")
    message = r"rows.*579 bytes .* 8 uint16 tokens \(16 bytes\): 36 rows and 3 bytes more"
    with pytest.raises(ValueError, match=message):
        batches(run)


def test_another_sequence_length_that_leaves_a_rest_is_refused(tmp_path: Path) -> None:
    run, _ = preshuffle(tmp_path, corpus(60, 60, 20))
    with pytest.raises(ValueError, match=r"check data\.sequence_length"):
        batches(replace(run, data=replace(run.data, sequence_length=10)))


def test_more_batches_than_rows_are_refused_before_any_is_read(tmp_path: Path) -> None:
    run, _ = preshuffle(tmp_path, corpus(60, 60, 20))
    longer = replace(run, training=replace(run.training, steps=STEPS + 1))
    with pytest.raises(
        ValueError, match=r"rows \(data.train\): holds 36 .*9 steps of batch_size 4, but 10"
    ):
        batches(longer)


def test_rows_do_not_wrap(tmp_path: Path) -> None:
    run, _ = preshuffle(tmp_path, corpus(60, 60, 20))
    samples = PreshuffledSamples(run.data.train[0], run.data.sequence_length)
    assert len(samples) == STEPS * BATCH
    for wrong in (STEPS * BATCH, -1):
        with pytest.raises(IndexError, match=f"row {wrong} asked for, but there are 36"):
            samples.read(np.array([0, wrong]))


def test_documents_that_are_not_known_are_an_error_that_names_the_key(tmp_path: Path) -> None:
    run, _ = preshuffle(tmp_path, corpus(60, 60, 20))
    served = batches(run)
    for ask in (lambda: served.pieces(0), lambda: served.steps_of_document(1)):
        with pytest.raises(DocumentsUnknown, match=r"set data.documents to the prefix"):
            ask()
    assert "documents  not known" in view(served, 0)
    assert "──" not in view(served, 0)


def test_a_document_out_of_range_is_an_error(tmp_path: Path) -> None:
    documents = corpus(60, 60, 20)
    run, _ = preshuffle(tmp_path, documents)
    served = batches(with_documents(run, documents, tmp_path))
    for number in (60, -1):
        with pytest.raises(IndexError, match=f"document {number} asked for, but there are 60"):
            served.steps_of_document(number)


def test_documents_of_other_data_are_refused_where_they_cannot_make_a_row(tmp_path: Path) -> None:
    run, _ = preshuffle(tmp_path, corpus(60, 60, 20))
    served = batches(with_documents(run, [[1], [2, 3]], tmp_path))
    with pytest.raises(ValueError, match=r"documents.* \(data.documents\): .* one sample takes 8"):
        served.pieces(0)


def test_rows_and_documents_are_traced_from_afar_as_from_here(tmp_path: Path) -> None:
    documents = corpus(60, 60, 20)
    run, _ = preshuffle(tmp_path, documents)
    here = with_documents(run, documents, tmp_path)
    files = {f"/{name}": (tmp_path / name).read_bytes() for name in ("rows.bin", "documents.idx")}
    server = RangeServer(files)
    with serving(server):
        where = {"train": (f"{server.url}/rows",), "documents": f"{server.url}/documents"}
        far = batches(replace(run, data=replace(run.data, **where)))
        for step in range(STEPS):
            np.testing.assert_array_equal(far[step], batches(here)[step])
            np.testing.assert_array_equal(far.pieces(step), batches(here).pieces(step))
        assert far.steps_of_document(5).tolist() == batches(here).steps_of_document(5).tolist()


def test_a_missing_index_of_documents_is_named(tmp_path: Path) -> None:
    run, _ = preshuffle(tmp_path, corpus(60, 60, 20))
    run = replace(run, data=replace(run.data, documents=str(tmp_path / "gone")))
    with pytest.raises(FileNotFoundError, match=r"gone.idx"):
        batches(run).pieces(0)


def test_no_rows_are_no_tokens(tmp_path: Path) -> None:
    run, _ = preshuffle(tmp_path, corpus(60, 60, 20))
    assert batches(run).read(0, []).shape == (0, 8)


def test_for_the_rows_of_pythia_the_order_is_drawn_for_the_samples_that_upstream_drew() -> None:
    """147,164,160 stands in the name of a published index map (EleutherAI/pythia issue 190)."""
    assert samples_to_draw(1, 143_000 * 1024) == 147_164_160


def test_int32_rows_are_not_taken_for_uint16(tmp_path: Path) -> None:
    tokens = np.random.RandomState(0).randint(1, 60_000, (10, 65)).astype("<i4")
    tokens.tofile(tmp_path / "rows.bin")
    with pytest.raises(ValueError, match=r"int32 tokens read as uint16; set model\.vocab_size"):
        PreshuffledSamples(str(tmp_path / "rows"), 64)
    assert len(PreshuffledSamples(str(tmp_path / "rows"), 64, vocab_size=70_000)) == 10
