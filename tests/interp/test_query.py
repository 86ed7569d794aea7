"""Queries: brute force in NumPy, rows that find themselves, factors, tables, Bergson's readers."""

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import index_cases
import jax
import numpy as np
import pytest
from index_cases import BATCH, START, STOP
from reference import distance

import pythia_jax as pj
from pythia_jax.data import batches, open_dataset
from pythia_jax.interp import bergson, factors, querying, tables
from pythia_jax.interp.bergson import check, export_index
from pythia_jax.interp.chunks import projection_sides
from pythia_jax.interp.collecting import LINEAR
from pythia_jax.interp.counterfactual_files import read_weights
from pythia_jax.interp.factor_fitting import fit_factors_of
from pythia_jax.interp.index import open_index
from pythia_jax.interp.passages import Passages
from pythia_jax.interp.projection import Projection
from pythia_jax.interp.querying import query, query_gradient, search

ROOT = Path(__file__).parents[2]
PEERS_VENV = Path(os.environ.get("PEERS_VENV", ROOT / ".venv-peers"))
TEXT, COMPLETION = "the cat sat", " on it"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return index_cases.packed(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def index(config, tmp_path_factory):
    return index_cases.build(config, tmp_path_factory.mktemp("built") / "index")


@pytest.fixture(scope="module")
def raw(config, tmp_path_factory):
    return index_cases.build(config, tmp_path_factory.mktemp("built") / "raw", projection=None)


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_scores_are_those_of_brute_force_in_any_blocks(index, metric, monkeypatch):
    wanted = np.random.default_rng(0).standard_normal(2048).astype(np.float32)
    every = np.asarray(index.gradients, np.float64) @ wanted
    if metric == "cosine":
        norms = np.linalg.norm(np.asarray(index.gradients, np.float64), axis=1)
        every /= norms * np.linalg.norm(wanted.astype(np.float64))
    order = np.argsort(-every)
    for rows in (1, 5, 1000):
        monkeypatch.setattr(querying, "BLOCK_BYTES", rows * 4 * 2048)
        scores, numbers = search(index, wanted, metric, top=7)
        np.testing.assert_array_equal(numbers, order[:7])
        np.testing.assert_allclose(
            scores, every[order[:7]], rtol=1e-5, atol=1e-6 * np.abs(every).max()
        )
    assert len(search(index, wanted, metric, top=1000)[1]) == len(index)


def test_equal_scores_stand_by_row(index):
    twice = dataclasses.replace(index, gradients=np.zeros((12, 2048), np.float32))
    assert search(twice, np.ones(2048), "cosine", 3)[1].tolist() == [0, 1, 2]


def test_hits_name_every_document_that_a_sequence_is_made_of(config, index):
    found = query(index, TEXT, model=index_cases.model(), top=len(index))
    documents, served = open_dataset(config.data.train[0]), batches(config)
    assert max(map(len, found.documents)) > 2
    for place, (row, numbers) in enumerate(zip(found.rows, found.documents, strict=True)):
        joined = np.concatenate([documents[number] for number in numbers])[row["offset"] :]
        sequence = served[int(row["step"])][row["slot"]]
        np.testing.assert_array_equal(joined[: len(sequence)], sequence)
        assert len(joined) - len(documents[numbers[-1]]) < len(sequence)
        s = "s" if len(numbers) > 1 else ""
        assert f", document{s} {', '.join(map(str, numbers))}, tokens" in found.described(place)


@pytest.mark.parametrize("which", ["index", "raw"])
def test_a_training_row_finds_itself_first_with_score_1(config, index, raw, which):
    opened = {"index": index, "raw": raw}[which]
    row = batches(config)[START + 1][2]
    found = query(opened, tokens=row, model=index_cases.model(), metric="cosine", top=3)
    assert found.numbers[0] == BATCH + 2
    assert found.scores[0] == pytest.approx(1, abs=1e-6)
    assert found.scores[1] < 0.9
    assert found.rows[0] == opened.rows[BATCH + 2]
    tokenizer = index_cases.model().tokenizer
    assert tokenizer is not None
    assert found.texts[0] == tokenizer.decode(row.tolist(), skip_special_tokens=False)


@jax.jit
def loss_gradient(params, tokens, counted):
    losses = lambda p: pj.token_losses(p, tokens[None], index_cases.CONFIG)[0]  # noqa: E731
    return jax.grad(lambda p: (losses(p) * counted).sum())(params)


def whole(tree) -> dict[str, np.ndarray]:
    """Kernels as torch has them, `[layers, out, in]`."""
    kernels = {}
    for module in LINEAR:
        _, part, name = module.split("/")
        kernels[module] = np.asarray(tree["layers"][part][name]["kernel"], np.float64)
    return {module: kernel.swapaxes(-1, -2) for module, kernel in kernels.items()}


def small(kernels: dict[str, np.ndarray], model) -> np.ndarray:
    sides = projection_sides(Projection(), model.config)
    assert sides is not None
    blocks = [
        np.einsum("lop,loi,liq->lpq", sides[m]["left"], kernels[m], sides[m]["right"])
        for m in LINEAR
    ]
    return np.concatenate([block.reshape(len(block), -1) for block in blocks], axis=1).ravel()


def test_a_completion_has_the_loss_alone(index):
    model = index_cases.model()
    tokenizer = model.tokenizer
    assert tokenizer is not None
    tokens = np.array(tokenizer.encode(TEXT + COMPLETION).ids)
    context = len(tokenizer.encode(TEXT).ids)
    counted = np.arange(1, len(tokens)) >= context
    expected = small(whole(loss_gradient(model.params, tokens, counted)), model)
    encoded, answer_at = querying.encoded(index, TEXT, COMPLETION)
    np.testing.assert_array_equal(encoded, tokens)
    assert distance(query_gradient(index, model, encoded, answer_at), expected) < 1e-5
    found = query(index, TEXT, completion=COMPLETION, model=model, top=12)
    scores = np.asarray(index.gradients, np.float64) @ expected
    np.testing.assert_allclose(found.scores, np.sort(scores)[::-1], rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def fitted(config, tmp_path_factory):
    """Factors of a checkpoint that `gradients factors` fitted, with what they came from."""
    folder = tmp_path_factory.mktemp("fitted")
    pj.save_hf(index_cases.model(), folder / "hf")
    how = {"method": "diagonal", "empirical": True, "rows": 4, "show_progress": False}
    fit_factors_of(folder / "hf", config, START, STOP, folder / "factors", step=7, **how)
    return folder / "factors"


def test_factors_precondition_the_whole_gradient_before_it_is_projected(index, fitted):
    model = index_cases.model()
    row, answer_at = querying.encoded(index, TEXT, COMPLETION)
    of = factors.load(fitted).modules
    squares = {module: np.asarray(of[module]["kernel"]).swapaxes(-1, -2) for module in LINEAR}
    counted = np.arange(1, len(row)) >= answer_at
    raw = whole(loss_gradient(model.params, row, counted))
    expected = small({m: raw[m] / (squares[m] + 0.01) for m in LINEAR}, model)
    scores = np.asarray(index.gradients, np.float64) @ expected
    how = {"model": model, "factors": fitted, "damping": 0.01, "top": 3}
    found = query(index, TEXT, completion=COMPLETION, **how)
    np.testing.assert_array_equal(found.numbers, np.argsort(-scores)[:3])
    np.testing.assert_allclose(found.scores, np.sort(scores)[::-1][:3], rtol=1e-3)


def test_factors_of_other_weights_and_damping_without_factors_are_refused(index, fitted):
    model = index_cases.model()
    row = index_cases.case.tokens("query", 1)[0]
    for dtype, told in (
        ("float32", r"of other weights \(.*hf.* step 7\)"),
        ("bfloat16", r"in float32 \(.*hf.* step 7\), and .* in bfloat16: give both the same"),
    ):
        settings = {**index.settings, "weights": "0" * 64, "computed_in": dtype}
        other = dataclasses.replace(index, provenance={**index.provenance, "settings": settings})
        with pytest.raises(ValueError, match=told):
            query(other, tokens=row, model=model, factors=fitted)
    with pytest.raises(ValueError, match="damping goes with factors"):
        query(index, tokens=row, model=model, damping=0.1)


def test_factors_of_projected_gradients_are_of_the_index_s_projection(index, tmp_path):
    model = index_cases.model()
    rng = np.random.default_rng(0)
    for name, dimension in (("same", 16), ("other", 4)):
        layers, size = model.config.num_hidden_layers, dimension**2
        modules = {
            module: {
                "values": np.sort(rng.random((layers, size), np.float32)),
                "vectors": np.linalg.qr(rng.normal(size=(layers, size, size)))[0].astype("f4"),
            }
            for module in LINEAR
        }
        made = factors.Factors(modules, "autocorrelation", projection=Projection(dimension))
        factors.save(made, tmp_path / name)
    row = querying.encoded(index, TEXT, COMPLETION)[0]
    with pytest.raises(ValueError, match=r"fitted in Projection\(dimension=4"):
        query(index, tokens=row, model=model, factors=tmp_path / "other")
    found = query(index, tokens=row, model=model, factors=tmp_path / "same", damping=0.1, top=12)
    # R is symmetric: preconditioning the rows instead gives the same scores.
    fitted = factors.load(tmp_path / "same")
    plain = query_gradient(index, model, row)
    expected = np.zeros(len(index))
    for name, columns in index.modules.items():
        layer, module = querying._layers_and_module(name)
        values, vectors = (np.asarray(fitted.modules[module][k][layer], np.float64)
                           for k in ("values", "vectors"))  # fmt: skip
        inverse = vectors @ np.diag(1 / (values + 0.1)) @ vectors.T
        expected += np.asarray(index.gradients[:, columns]) @ inverse @ plain[columns]
    assert distance(found.scores, np.sort(expected)[::-1]) < 1e-3


def test_a_model_of_other_weights_is_refused_with_what_differs(index):
    model = index_cases.model()
    other = dataclasses.replace(
        model, params=jax.tree.map(lambda x: x * 1.5, model.params), step=7, source="elsewhere"
    )
    with pytest.raises(
        ValueError, match=r"elsewhere has other weights: weights '.*step None there, 7"
    ):
        query(index, TEXT, model=other)


def test_an_index_of_a_model_in_memory_wants_it_given(index):
    with pytest.raises(ValueError, match="which cannot be found again: give it as model"):
        query(index, TEXT)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"text": TEXT, "metric": "euclid"}, "metric 'euclid': choose dot or cosine"),
        ({"text": TEXT, "top": 0}, "top 0"),
        ({}, "as a text or as tokens, and not both"),
        ({"text": TEXT, "tokens": np.arange(4)}, "and not both"),
        ({"text": "", "completion": "x"}, "needs a text before it"),
        ({"text": "a"}, "the query is too short: .* at least two are wanted, and not 1"),
        ({"text": ""}, "too short: .* and not 0"),
        ({"tokens": np.arange(40)}, "too long: 40 tokens; up to 33 fit"),
        ({"tokens": np.ones((1, 4), int)}, r"tokens of shape \(1, 4\): those of one query"),
        ({"tokens": np.arange(4), "answer_at": 4}, "answer_at 4"),
        ({"tokens": np.array([1, 256])}, "token 256 is not in the vocabulary"),
        ({"tokens": np.arange(4), "completion": "x"}, "a completion goes with a text"),
    ],
)
def test_bad_queries_are_refused(index, how, message):
    with pytest.raises(ValueError, match=message):
        query(index, model=index_cases.model(), **how)


def test_hits_are_written_as_parquet_and_csv(config, index, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    found = query(index, TEXT, model=index_cases.model(), top=4)
    for name in ("hits.parquet", "hits.csv"):
        tables.write(tmp_path / name, found.columns())
    table = parquet.read_table(tmp_path / "hits.parquet").to_pydict()
    with (tmp_path / "hits.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert list(table) == list(lines[0])
    assert table["row"] == found.numbers.tolist() == [int(line["row"]) for line in lines]
    assert table["step"] == found.rows["step"].tolist()
    assert table["text"] == found.texts == [line["text"] for line in lines]
    np.testing.assert_allclose([float(line["score"]) for line in lines], found.scores, rtol=1e-6)
    with pytest.raises(ValueError, match=r"end it in \.parquet or \.csv"):
        tables.write(tmp_path / "hits.json", found.columns())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hits.csv", "hits.parquet"]
    # A counterfactual takes them for rows of its run wherever the data lies, in this order alone.
    (tmp_path / "moved").mkdir()
    moved = index_cases.packed(tmp_path / "moved")
    prefix = config.data.train[0]
    others = index_cases.run(prefix, {"seed": 9}), index_cases.run(prefix, steps=START)
    for name in ("hits.parquet", "hits.csv"):
        dropped = read_weights(tmp_path / name, moved, drop=True)
        assert set(dropped) == set(found.rows[["step", "slot"]].tolist())
        for changed in others:
            with pytest.raises(ValueError, match="is a row of other data, or of another order"):
                read_weights(tmp_path / name, changed, drop=True)


def test_without_pyarrow_parquet_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RuntimeError, match="not installed: pip install 'pythia-jax\\[parquet\\]'"):
        tables.check(tmp_path / "hits.parquet")


def test_an_index_whose_data_is_gone_still_scores(config, index, tmp_path, caplog):
    shutil.copytree(index.folder, tmp_path / "index")
    run, here = tmp_path / "index" / "run.yaml", config.data.train[0]
    assert here in run.read_text()
    run.write_text(run.read_text().replace(here, str(tmp_path / "gone")))
    built = open_index(tmp_path / "index")
    model = index_cases.model()
    found = query(built, TEXT, model=model, top=2)
    assert found.texts == []
    assert "tokens of its rows cannot be read" in caplog.text
    # The same data elsewhere; and other data is refused.
    assert len(query(built, TEXT, model=model, top=2, data=config).texts) == 2
    other = index_cases.run(config.data.train[0], {"seed": 9})
    with pytest.raises(ValueError, match="not the rows that"):
        query(built, TEXT, model=model, top=2, data=other)


def test_an_export_is_whole_and_linked(index, tmp_path):
    assert export_index(index.folder, show_progress=False) == index.folder
    made = export_index(index.folder, tmp_path / "plain", show_progress=False)
    assert (made / "gradients.bin").samefile(index.folder / "gradients.bin")
    texts = (made / bergson.TEXTS).read_text(encoding="utf-8").splitlines()
    assert len(texts) == len(index)
    passages = Passages(index)
    for row in (0, 11):
        assert json.loads(texts[row]) == {"text": passages.text(row)}
    with pytest.raises(FileExistsError, match="there already"):
        export_index(index.folder, made, show_progress=False)


def test_an_export_to_another_disk_is_a_copy(index, tmp_path):
    def refused(source, target):
        raise OSError(18, "Invalid cross-device link")

    bergson.link_or_copy(index.folder / "info.json", tmp_path / "copy", link=refused)
    assert (tmp_path / "copy").read_bytes() == (index.folder / "info.json").read_bytes()
    assert not (tmp_path / "copy").samefile(index.folder / "info.json")


def test_a_check_names_the_row_whose_bytes_changed(index, tmp_path):
    shutil.copytree(index.folder, tmp_path / "index")
    built = open_index(tmp_path / "index")
    with (built.folder / "gradients.bin").open("r+b") as file:
        file.seek(5 * 2048 * 4 + 100)
        file.write(b"\x01")
    with pytest.raises(ValueError, match=r"row 5 \(step 3, slot 1, .*is damaged"):
        check(open_index(built.folder), show_progress=False)
    (built.folder / "info.json").write_text("{}")
    with pytest.raises(ValueError, match=r"info\.json: is not what the index is"):
        export_index(built.folder, tmp_path / "plain", show_progress=False)
    assert not (tmp_path / "plain").exists()


READER = """
import sys
from pathlib import Path

import numpy as np
import torch
from bergson import Attributor
from bergson.data import load_gradients
from torch import nn
from transformers import AutoModelForCausalLM

index, folder, tokens = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
linear = {n for n, m in model.base_model.named_modules() if isinstance(m, nn.Linear)}
x = torch.tensor(np.load(tokens)).long()[None]
with Attributor(index, unit_norm=True).trace(model.base_model, 3, modules=linear) as found:
    model(x, labels=x).loss.backward()
print(load_gradients(Path(index)).shape)
print(found.indices.squeeze().tolist(), found.scores.squeeze().tolist())
"""


@pytest.mark.slow
def test_bergson_reads_an_index_of_ours(config, index, tmp_path):
    python = PEERS_VENV / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment with Bergson at {PEERS_VENV}: make test-all makes one")
    pj.save_hf(index_cases.model(), tmp_path / "hf")
    row = batches(config)[START][3]
    np.save(tmp_path / "row.npy", row)
    (tmp_path / "reader.py").write_text(textwrap.dedent(READER))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": ""}
    how = {"env": {**os.environ, **offline}, "text": True, "check": False, "capture_output": True}
    command = [python, tmp_path / "reader.py", index.folder, tmp_path / "hf", tmp_path / "row.npy"]
    done = subprocess.run(command, **how)
    assert done.returncode == 0, done.stderr[-3000:]
    shape, answer = done.stdout.splitlines()[-2:]
    assert shape == "(12, 2048)"
    ours = query(index, tokens=row, model=index_cases.model(), metric="cosine", top=3)
    numbers, scores = eval(answer.replace("] [", "], ["))
    assert numbers == ours.numbers.tolist()
    np.testing.assert_allclose(scores, ours.scores, atol=1e-5)

    out = export_index(index.folder, tmp_path / "plain", model=str(tmp_path / "hf"))
    asked = subprocess.run(
        [PEERS_VENV / "bin" / "bergson", "query", "--index", out, "--top_k", "2"],
        input="the cat sat\nexit\n",
        **how,
    )
    assert asked.returncode == 0, asked.stderr[-3000:]
    best = query(index, "the cat sat", model=index_cases.model(), metric="cosine", top=2)
    assert f"1: (distance: {best.scores[0]:.4f})" in asked.stdout
    assert "Top 2 results for 'the cat sat'" in asked.stdout
