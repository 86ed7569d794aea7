"""The report of what int8 loses, beside the two models run as anybody runs them, and NumPy."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import TINY, random_params, random_tokens

import pythia_jax as pj
from pythia_jax.bridge import Model
from pythia_jax.data import IndexedDatasetWriter
from pythia_jax.evaluation import quantized
from pythia_jax.model import quantize
from pythia_jax.model.parameters import items
from pythia_jax.model.quantize import Quantized

HOW: Any = {"show_progress": False}
CONFIG = dataclasses.replace(TINY, num_hidden_layers=2, max_position_embeddings=16)
TEXT = "A cat sat on the mat; the mat was of no interest to the cat, which slept. " * 3


@pytest.fixture(scope="module")
def floats(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {chr(33 + i): i + 1 for i in range(94)} | {"<|endoftext|>": 0, "Ġ": 95}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    tokenizer.enable_truncation(10)  # which a text is not cut by
    files = {"tokenizer.json": tokenizer.to_str().encode()}
    folder = tmp_path_factory.mktemp("report") / "floats"
    pj.save_hf(Model(random_params(CONFIG), CONFIG, tokenizer_files=files), folder)
    return folder


@pytest.fixture(scope="module", params=["float", "dynamic"])
def both(request, floats, tmp_path_factory) -> tuple[Path, Path, str]:
    folder = tmp_path_factory.mktemp("int8") / "model"
    pj.quantize(floats, folder, activations=request.param, **HOW)
    return floats, folder, request.param


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("data") / "tokens"
    with IndexedDatasetWriter(place, np.dtype(np.uint16)) as writer:
        for size in (30, 1, 70):
            writer.add(random_tokens(CONFIG, 1, size, seed=size)[0].astype(np.uint16))
    return place


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_perplexity_and_logits_are_those_of_the_two_models(both, prefix) -> None:
    floats, int8, activations = both
    found = quantized.report(floats, prefix=str(prefix), activations=activations, **HOW).text
    assert found is not None
    tokens = np.asarray(pj.data.open(prefix).tokens).astype(np.int32)
    rows = np.stack([tokens[16 * i : 16 * i + 17] for i in range(6)])  # 101 tokens: 6 rows of 16
    assert found.tokens == 96
    logits = []
    for folder, perplexity in (
        (floats, found.perplexity_before),
        (int8, found.perplexity_after),
    ):
        model = pj.load(folder)
        value = np.asarray(pj.forward(model.params, rows[:, :-1], CONFIG), np.float64)
        normed = value - np.log(np.exp(value).sum(axis=-1, keepdims=True))
        mean = -np.take_along_axis(normed, rows[:, 1:, None], axis=-1).mean()
        assert perplexity == pytest.approx(np.exp(mean), rel=2e-6)
        logits.append(value - value.mean(axis=-1, keepdims=True))
    assert found.perplexity_before != found.perplexity_after
    assert found.logits == pytest.approx(relative(logits[1], logits[0]), rel=1e-2)


def test_errors_of_matrices_and_of_their_outputs_are_numpy_s(both, prefix) -> None:
    floats, int8, activations = both
    report = quantized.report(floats, prefix=str(prefix), activations=activations, **HOW)
    before, after = (pj.load(folder) for folder in (floats, int8))
    stored = {p.path: value for p, value in items(after.params)}
    for parameter, wanted in items(before.params):
        rounded = stored[parameter.path]
        if not isinstance(rounded, Quantized):
            continue
        kernel = np.asarray(quantize.kernel(rounded))
        kernel = kernel if parameter.transposed else kernel.mT
        module = parameter.path.removeprefix("layers/").rpartition("/")[0]
        pairs = zip(kernel, wanted, strict=True) if parameter.stacked else [(kernel, wanted)]
        errors = [relative(a, np.asarray(b)) for a, b in pairs]
        assert report.weights[module] == pytest.approx(errors, rel=1e-3)
        assert all(1e-3 < error < 1e-2 for error in errors)
    tokens = np.asarray(pj.data.open(prefix).tokens).astype(np.int32)[:96].reshape(6, 16)
    _, sites = pj.forward(before.params, tokens, CONFIG, capture=("mlp.post", "ln_final"))
    for module, value, kernel, index in (
        ("mlp/dense_4h_to_h", sites["mlp.post"][1], "layers/mlp/dense_4h_to_h/kernel", 1),
        ("embed_out", sites["ln_final"], "embed_out/kernel", 0),
    ):
        value, whole = np.asarray(value, np.float64), stored[kernel]
        scale = np.abs(value).max(axis=-1, keepdims=True) / (127 if whole.dynamic else np.inf)
        read = np.rint(value / scale) * scale if whole.dynamic else value
        tables = [
            np.asarray(x[index] if kernel.startswith("layers") else x, np.float64)
            for x in (quantize.kernel(whole), dict(_flat(before.params))[kernel])
        ]
        wanted = relative(read @ tables[0], value @ tables[1])
        assert report.text is not None
        assert report.text.outputs[module][index] == pytest.approx(wanted, rel=2e-2)


def _flat(params):
    return ((parameter.path, value) for parameter, value in items(params))


def test_bytes_are_those_of_the_file(both) -> None:
    floats, int8, activations = both
    for dtype in ("float32", "float16"):
        found = quantized.report(floats, activations=activations, dtype=dtype, **HOW)
        pj.quantize(floats, int8, activations=activations, dtype=dtype, **HOW)
        file = int8 / "model.safetensors"
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert found.bytes_in["int8"] == file.stat().st_size - header
    whole = floats / "model.safetensors"
    header = 8 + int.from_bytes(whole.read_bytes()[:8], "little")
    assert found.bytes_in["float32"] == whole.stat().st_size - header
    pj.quantize(floats, int8, activations=activations, **HOW)


def test_without_a_text_the_weights_alone_are_told(floats, tmp_path) -> None:
    found = quantized.report(floats, keep_embeddings=True, **HOW)
    assert found.text is None
    assert found.weights["embed_in"] == found.weights["embed_out"] == [0.0]
    lines = found.table().splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["layer", "0"], ["layer", "1"]]
    assert "perplexity" not in found.table()
    found.save(tmp_path)
    content = json.loads((tmp_path / quantized.FILE).read_text())
    assert content["text"] is None and content["weights"] == found.weights


def test_of_a_text_the_first_tokens_are_read_whole(floats, tmp_path, monkeypatch) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    opened = quantized.open_floats(floats)
    rows = quantized.rows_of(opened, path, None)
    tokenizer = pj.load(floats).tokenizer
    assert tokenizer is not None
    tokenizer.no_truncation()
    ids = [*tokenizer.encode(TEXT).ids, 0]
    assert rows.shape == ((len(ids) - 1) // 16, 17) and len(rows) > 5
    assert np.concatenate([rows[:, :-1].reshape(-1), rows[-1, -1:]]).tolist() == ids[: rows.size
        - len(rows) + 1]  # fmt: skip
    monkeypatch.setattr(quantized, "TOKENS", 40)
    assert quantized.rows_of(opened, path, None).tolist() == rows[:2].tolist()
    path.write_text("cat")
    assert quantized.rows_of(opened, path, None).shape == (1, 4)


def test_texts_that_cannot_be_used_are_refused(floats, prefix, tmp_path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(ValueError, match="no two tokens"):
        quantized.report(floats, text=empty, **HOW)
    with pytest.raises(ValueError, match="give one of them"):
        quantized.report(floats, text=empty, prefix=str(prefix), **HOW)
    with pytest.raises(FileNotFoundError):
        quantized.report(floats, text=tmp_path / "none", **HOW)
    with IndexedDatasetWriter(tmp_path / "other", np.dtype(np.uint16)) as writer:
        writer.add(np.array([3, 130, 4], np.uint16))
    with pytest.raises(ValueError, match="token 130 is not in the vocabulary of 130"):
        quantized.report(floats, prefix=str(tmp_path / "other"), **HOW)
    pj.save_hf(Model(random_params(CONFIG), CONFIG), tmp_path / "mute")
    with pytest.raises(ValueError, match=r"has no tokenizer, so text \(--text\) cannot be read"):
        quantized.report(tmp_path / "mute", text=empty, **HOW)
