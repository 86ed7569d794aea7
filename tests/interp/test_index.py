"""Rows of an index: true documents at true places; what is not a whole index is not opened."""

import json
import shutil

import index_cases
import numpy as np
import pytest
from index_cases import BATCH, START, STOP

from pythia_jax.data import batches, open_dataset
from pythia_jax.interp import index as files
from pythia_jax.interp.index import open_index, table

LENGTH = 25


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return index_cases.packed(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def index(config, tmp_path_factory):
    return index_cases.build(config, tmp_path_factory.mktemp("built") / "index")


def test_rows_of_documents_hold_the_tokens_of_these_documents(config):
    served, dataset = batches(config), open_dataset(config.data.train[0])
    rows = table(served, LENGTH, range(START, STOP), "document")
    assert len(rows) > 2 * (STOP - START) * BATCH  # several documents a row
    for row in rows:
        document = dataset[int(row["document"])]
        own = served[int(row["step"])][row["slot"]][row["start"] : row["stop"]]
        offset = int(row["offset"])
        np.testing.assert_array_equal(document[offset : offset + len(own)], own)
        assert row["stop"] > 1


def test_rows_of_documents_hold_every_token_that_has_a_loss_once(config):
    rows = table(batches(config), LENGTH, range(START, STOP), "document")
    found = np.zeros(((STOP - START), BATCH, LENGTH), int)
    for row in rows:
        found[row["step"] - START, row["slot"], row["start"] : row["stop"]] += 1
    np.testing.assert_array_equal(found[..., 1:], 1)


def test_a_document_that_has_a_sequences_first_token_alone_has_no_row(tmp_path):
    # Four rows as they lie, each of a document of one token and the rest of another.
    index_cases.write_corpus(tmp_path / "corpus", [1, 24] * 40)
    config = index_cases.run(tmp_path / "corpus")
    served = batches(config)
    rows = table(served, LENGTH, range(8), "document")
    pieces = [served.pieces(step) for step in range(8)]
    alone = sum(((p.column == 0) & (p.length == 1)).sum() for p in pieces)
    assert alone > 0
    assert len(rows) == sum(len(p.row) for p in pieces) - alone


def test_rows_of_sequences_tell_their_first_document_and_how_many(config):
    served, dataset = batches(config), open_dataset(config.data.train[0])
    rows = table(served, LENGTH, range(START, STOP), "sequence")
    assert [(r["step"], r["slot"]) for r in rows] == [
        (step, slot) for step in range(START, STOP) for slot in range(BATCH)
    ]
    for row in rows:
        pieces = served.pieces(int(row["step"]), [int(row["slot"])])
        assert row["documents"] == len(pieces.row)
        first = dataset[int(row["document"])][row["offset"]]
        assert first == served[int(row["step"])][row["slot"]][0]
    assert rows["documents"].max() > 2


def test_a_sample_is_spread_evenly_and_takes_whole_sequences(config):
    served = batches(config)
    rows = table(served, LENGTH, range(8), "sequence", sample=5)
    places = rows["step"] * BATCH + rows["slot"]
    assert len(places) == 5
    assert set(np.diff(places)) <= {6, 7}
    documents = table(served, LENGTH, range(8), "document", sample=5)
    assert set(documents["step"] * BATCH + documents["slot"]) == set(places)
    everything = table(served, LENGTH, range(8), "sequence")
    np.testing.assert_array_equal(table(served, LENGTH, range(8), "sequence", 1000), everything)


def test_documents_that_are_not_known_are_told_so(tmp_path):
    served = batches(index_cases.golden_rows(tmp_path))
    rows = table(served, LENGTH, range(1), "sequence")
    assert set(rows["document"]) == {-1}
    assert set(rows["documents"]) == {0}
    with pytest.raises(ValueError, match=r"data\.documents"):
        table(served, LENGTH, range(1), "document")


def test_rows_that_a_transform_changes_have_no_known_documents(config, tmp_path, monkeypatch):
    (tmp_path / "changing.py").write_text("def same(step, rows):\n    return rows\n")
    monkeypatch.syspath_prepend(tmp_path)
    changed = index_cases.run(
        config.data.train[0], {"transform": "changing:same", "transform_from": 3}
    )
    served = batches(changed)
    assert set(table(served, LENGTH, range(2, 4), "sequence")["document"]) == {-1}
    with pytest.raises(ValueError, match="changes rows from step 3 on"):
        table(served, LENGTH, range(2, 4), "document")
    assert len(table(served, LENGTH, range(2, 3), "document")) > BATCH


def test_an_index_opens_with_its_modules_and_settings(index):
    again = open_index(index.folder)
    assert len(again) == (STOP - START) * BATCH
    assert again.gradients.shape == (12, 2 * 4 * 16 * 16)
    assert list(again.modules)[:5] == [
        "layers.0.attention.query_key_value",
        "layers.0.attention.dense",
        "layers.0.mlp.dense_h_to_4h",
        "layers.0.mlp.dense_4h_to_h",
        "layers.1.attention.query_key_value",
    ]
    block = again.by_module("layers.1.attention.query_key_value")
    np.testing.assert_array_equal(block, again.gradients[:, 1024:1280].reshape(12, 16, 16))
    assert again.model_config == index_cases.CONFIG
    with pytest.raises(ValueError, match=r"there is no module 'layers\.2\.mlp'"):
        again.by_module("layers.2.mlp")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (files.GRADIENTS, b"12", r"2 bytes, but 12 rows of 2,048 numbers \(float32\) take 98,304"),
        (files.GRADIENTS, None, "0 bytes"),
        (files.ROWS, b"nothing", "is damaged"),
        (files.PROVENANCE, b"{}", "damaged, so nothing tells what the gradient index is of"),
        (files.PROVENANCE, b'{"settings": {}, "computed": {}}', "is damaged"),
    ],
)
def test_a_damaged_index_is_not_opened(index, tmp_path, name, content, message):
    copy = tmp_path / "copy"
    shutil.copytree(index.folder, copy)
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_index(copy)


def test_an_index_that_is_not_there_or_not_finished_is_not_opened(index, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no gradient index"):
        open_index(tmp_path)
    shutil.copytree(index.folder, tmp_path / "half.building")
    with pytest.raises(FileNotFoundError, match="is not finished"):
        open_index(tmp_path / "half")


def test_provenance_tells_weights_step_data_and_versions(index):
    told = json.loads((index.folder / files.PROVENANCE).read_text())
    assert set(told["settings"]) >= {"weights", "step", "data", "steps", "unit", "projection"}
    assert told["settings"]["steps"] == [START, STOP]
    assert told["settings"]["data"]["train"][0]["bin_bytes"] == 2 * sum(index_cases.DOCUMENTS)
    assert set(told["computed"]) >= {"pythia_jax", "jax", "device_kind", "bergson"}
