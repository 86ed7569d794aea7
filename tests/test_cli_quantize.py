"""`pythia-jax quantize`, as it is typed."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import refused, run
from reference import TINY, random_params, random_tokens

import pythia_jax as pj
from pythia_jax.bridge import Model
from pythia_jax.data import IndexedDatasetWriter


@pytest.fixture(scope="module")
def floats(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "floats"
    pj.save_hf(Model(random_params(TINY), TINY), folder, dtype="float16")
    return folder


def test_a_folder_in_int8_and_what_it_lost(floats, tmp_path) -> None:
    with IndexedDatasetWriter(tmp_path / "data", np.dtype(np.uint16)) as writer:
        writer.add(random_tokens(TINY, 1, 150)[0].astype(np.uint16))
    out = tmp_path / "int8"
    told = run(
        "quantize", floats, out, "--activations", "dynamic", "--report", "--data", tmp_path / "data"
    )
    assert told.exit_code == 0, told.output
    assert f"{floats} -> {out}" in told.output
    content = json.loads((out / "quantization.json").read_text())
    assert content["text"]["tokens"] == 149
    assert "on 149 tokens" in told.output and "layer 2" in told.output
    assert f"{content['text']['logits']:.3%} off" in told.output
    again = run("quantize", floats, out)  # the report goes with what it was of
    assert again.exit_code == 0, again.output
    assert not (out / "quantization.json").exists()
    model = pj.load(out)
    assert model.stored_dtype == "float16"
    assert not model.params["embed_out"]["kernel"].dynamic


def test_a_report_alone_writes_nothing(floats, tmp_path) -> None:
    told = run("quantize", floats, "--report", "--keep-embeddings", "--dtype", "float32")
    assert told.exit_code == 0, told.output
    assert "size " in told.output and "perplexity" not in told.output
    assert not list(tmp_path.iterdir())


def test_mistakes_are_one_line(floats, tmp_path) -> None:
    out = tmp_path / "int8"
    assert "bits (--bits) 4: only 8 is known here" in refused("quantize", floats, out, "--bits", 4)
    assert "quantize MODEL TARGET, or --report" in refused("quantize", floats)
    assert "go with --report" in refused("quantize", floats, out, "--text", tmp_path)
    assert "no such folder" in refused("quantize", tmp_path / "none", out)
    assert "'int4'" in refused("quantize", floats, out, "--activations", "int4")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    assert "no part of an exported model" in refused("quantize", floats, tmp_path / "mine")
    assert run("quantize", floats, out).exit_code == 0
    assert "is in int8 already" in refused("quantize", out, tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8", "mine"]
