"""The report of what int8 loses, beside the two models run as anybody runs them, and NumPy."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import refused, run
from reference import TINY, random_params, random_tokens

import pythia_jax as pj
from pythia_jax.bridge import Model
from pythia_jax.data import IndexedDatasetWriter
from pythia_jax.evaluation import quantized
from pythia_jax.model import quantize
from pythia_jax.model.parameters import items
from pythia_jax.model.quantize import Quantized

HOW: Any = {"show_progress": False}
EXACT = 1e-3
"""Relative: of an error in NumPy's float64 and in float32."""
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
    # Of 101 tokens 100 are predicted: 6 rows of 16, and 4 tokens more.
    rows = [tokens[i : i + 17][None] for i in range(0, 100, 16)]
    assert found.tokens == sum(row.size - 1 for row in rows) == 100
    logits = []
    for folder, perplexity in (
        (floats, found.perplexity_before),
        (int8, found.perplexity_after),
    ):
        model = pj.load(folder)
        made = [pj.forward(model.params, row[:, :-1], CONFIG)[0] for row in rows]
        value = np.concatenate(made).astype(np.float64)
        normed = value - np.log(np.exp(value).sum(axis=-1, keepdims=True))
        assert perplexity == pytest.approx(np.exp(-normed[range(100), tokens[1:]].mean()), rel=1e-5)
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
    tokens = np.asarray(pj.data.open(prefix).tokens).astype(np.int32)
    # Of 101 tokens all but the last are read: 6 rows of 16, and one of 4.
    read = [
        module_inputs(before, part) for part in (tokens[:96].reshape(6, 16), tokens[None, 96:100])
    ]
    floating = {p.path: np.asarray(value, np.float64) for p, value in items(before.params)}
    assert report.text is not None
    for module, inputs in read[0].items():
        path = f"{module}/kernel" if module == "embed_out" else f"layers/{module}/kernel"
        dynamic, rounded = stored[path].dynamic, np.asarray(quantize.kernel(stored[path]))
        assert len(report.text.outputs[module]) == len(inputs)
        for layer, found in enumerate(report.text.outputs[module]):
            value = np.concatenate([part[module][layer] for part in read]).astype(np.float64)
            scale = np.abs(value).max(axis=-1, keepdims=True) / 127
            whole = np.rint(value / scale) * scale if dynamic else value
            tables = [x if module == "embed_out" else x[layer] for x in (rounded, floating[path])]
            wanted = relative(whole @ tables[0], value @ tables[1])
            assert found == pytest.approx(wanted, rel=EXACT), (module, layer)
    embeddings = [
        np.asarray(table, np.float64)[tokens[:100]]
        for table in (
            quantize.kernel(stored["embed_in/embedding"]).mT,
            floating["embed_in/embedding"],
        )
    ]
    assert report.text.outputs["embed_in"] == [pytest.approx(relative(*embeddings), rel=EXACT)]


def module_inputs(model: Any, tokens: np.ndarray) -> dict[str, list[np.ndarray]]:
    """What each matrix is multiplied with in a float model: by module, `[row, in]` a layer."""
    sites = ("resid_pre", "attn.z", "mlp_in", "mlp.post", "ln_final")
    _, read = pj.forward(model.params, tokens, CONFIG, capture=sites)
    layers = model.params["layers"]
    found: dict[str, list] = {
        "attention/query_key_value": _normed(read["resid_pre"], layers["input_layernorm"]),
        "attention/dense": list(read["attn.z"]),
        "mlp/dense_h_to_4h": _normed(read["mlp_in"], layers["post_attention_layernorm"]),
        "mlp/dense_4h_to_h": list(read["mlp.post"]),
        "embed_out": [read["ln_final"]],
    }
    return {
        module: [np.asarray(value).reshape(tokens.size, -1) for value in values]
        for module, values in found.items()
    }


def _normed(streams: Any, norm: dict) -> list[np.ndarray]:
    """LayerNorm, layer by layer, of `[layer, batch, seq, hidden]`."""
    streams = np.asarray(streams, np.float64)
    centred = streams - streams.mean(axis=-1, keepdims=True)
    deviation = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + CONFIG.layer_norm_eps)
    scale, bias = (np.asarray(norm[name], np.float64) for name in ("scale", "bias"))
    return [x * scale[i] + bias[i] for i, x in enumerate(centred / deviation)]


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


def test_what_stays_in_floats_is_told_in_the_dtype_it_is_written_in(floats) -> None:
    found = quantized.report(floats, keep_embeddings=True, dtype="bfloat16", **HOW)
    (error,) = found.weights["embed_in"]
    assert 2**-11 < error < 2**-8


def test_of_a_text_the_first_tokens_are_read_to_the_last(floats, tmp_path, monkeypatch) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    opened = quantized.open_floats(floats)
    tokenizer = pj.load(floats).tokenizer
    assert tokenizer is not None
    tokenizer.no_truncation()
    ids = [*tokenizer.encode(TEXT).ids, 0]

    def check(ids: list[int]) -> None:
        whole, *rest = quantized.rows_of(opened, path, None)
        rows = [*whole.tolist(), *(row for some in rest for row in some.tolist())]
        assert rows == [ids[i : i + 17] for i in range(0, len(ids) - 1, 16)]
        assert len(rest) == ((len(ids) - 1) % 16 > 0)

    assert len(ids) > 5 * 16
    check(ids)
    for most in (40, 48, 49):
        monkeypatch.setattr(quantized, "TOKENS", most)
        check(ids[: most + 1])
    path.write_text("cat")
    (row,) = quantized.rows_of(opened, path, None)
    assert row.shape == (1, 4)


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


def test_the_target_is_looked_at_before_a_report_is_made(floats, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(quantized, "report", lambda *_, **__: pytest.fail("a report is made"))
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "notes.txt").write_text("keep")
    told = refused("quantize", floats, tmp_path / "busy", "--report")
    assert "no part of an exported model" in told


def test_what_is_written_stays_if_there_can_be_no_report(floats, tmp_path) -> None:
    out, empty = tmp_path / "int8", tmp_path / "empty.txt"
    assert "does not exist" in refused("quantize", floats, out, "--report", "--text", empty)
    assert not out.exists()
    empty.write_text("")
    told = run("quantize", floats, out, "--report", "--text", empty)
    assert told.exit_code == 1
    assert f"{floats} -> {out}" in told.output and f"{empty}: holds no two" in told.output
    assert not (out / quantized.FILE).exists()
    assert pj.load(out).config == CONFIG
