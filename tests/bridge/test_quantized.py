"""Models in int8 on disk: written from any kind, beside torch's own rounding, and read again."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from hf_folders import our_logits, write_theirs
from reference import TINY, hf_model, random_tokens
from safetensors.torch import load_file, save_file

import pythia_jax as pj
from pythia_jax.bridge import CheckpointError, hf_out, int8
from pythia_jax.bridge.convert import convert, open_any
from pythia_jax.bridge.opened import Opened
from pythia_jax.bridge.revisions import weights_hash
from pythia_jax.bridge.safetensors_out import Tensor
from pythia_jax.configs import ConfigError, ModelConfig
from pythia_jax.model.parameters import TABLE, items
from pythia_jax.model.quantize import Quantized

HOW: Any = {"show_progress": False}
WEIGHTS = "model.safetensors"
ROOT = Path(__file__).parents[2]
PEERS_VENV = Path(os.environ.get("PEERS_VENV", ROOT / ".venv-peers"))


@pytest.fixture(scope="module")
def quantized(theirs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "model"
    pj.quantize(theirs, folder, **HOW)
    return folder


def floats(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder in int8, multiplied out by torch."""
    found = load_file(folder / WEIGHTS)
    return {
        name: value.float() * found[f"{name}_scale"] if value.dtype == torch.int8 else value
        for name, value in found.items()
        if not name.endswith("_scale")
    }


def test_matrices_are_those_that_torch_rounds_and_all_else_stays(theirs, quantized) -> None:
    before, after = load_file(theirs / WEIGHTS), load_file(quantized / WEIGHTS)
    matrices = {name for name, value in before.items() if value.ndim == 2}
    assert len(matrices) == 4 * TINY.num_hidden_layers + 2
    assert after.keys() == before.keys() | {f"{name}_scale" for name in matrices}
    for name, value in before.items():
        if name not in matrices:
            assert torch.equal(after[name], value)
            continue
        scale = value.abs().amax(dim=1, keepdim=True) / 127
        assert after[name].dtype == torch.int8
        assert torch.equal(after[f"{name}_scale"], scale)
        assert torch.equal(after[name], torch.round(value / scale).to(torch.int8))


def test_the_file_is_laid_out_as_the_library_lays_it_out(quantized, tmp_path) -> None:
    save_file(load_file(quantized / WEIGHTS), tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert (quantized / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_matrix_is_read_once_whichever_of_its_tensors_comes_first(order) -> None:
    weight, reads = np.random.default_rng(0).standard_normal((5, 7), np.float32), []

    def read() -> np.ndarray:
        reads.append(weight)
        return weight

    both = int8.tensors(Tensor("a.weight", weight.shape, read))
    found = {i: both[i].read() for i in order}
    assert len(reads) == 1
    np.testing.assert_allclose(found[0] * found[1], weight, atol=float(found[1].max()) / 2)
    for i, name in enumerate(("a.weight", "a.weight_scale")):
        assert (both[i].name, both[i].shape) == (name, found[i].shape)


def test_what_is_loaded_computes_what_transformers_does_with_the_same_weights(quantized) -> None:
    model = pj.load(quantized)
    values = {p.path: value for p, value in items(model.params)}
    whole = {path for path, value in values.items() if isinstance(value, Quantized)}
    assert whole == {p.path for p in TABLE if p.path.endswith(("kernel", "embedding"))}
    assert not any(values[path].dynamic for path in whole)
    reference = hf_model(open_any(quantized).params(), TINY)
    for name, value in floats(quantized).items():  # in our orientation, and in theirs
        ours = reference.state_dict()[name.replace("embed_out", "lm_head")]
        assert torch.equal(ours, value), name
    tokens = random_tokens(TINY, 2, 40)
    with torch.no_grad():
        wanted = reference(torch.tensor(tokens.astype(np.int64))).logits.numpy()
    found = our_logits(model, tokens)
    assert np.linalg.norm(found - wanted) < 2e-4 * np.linalg.norm(wanted)


@pytest.mark.parametrize("activations", ["float", "dynamic"])
def test_greedy_tokens_are_those_that_the_forward_pass_picks(theirs, tmp_path, activations) -> None:
    pj.quantize(theirs, tmp_path / "int8", activations=activations, **HOW)
    model = pj.load(tmp_path / "int8")
    forward = jax.jit(lambda tokens: pj.forward(model.params, tokens, TINY))
    prompts = [[1, 2, 3], [7], list(range(40, 56))]
    made = pj.generate(model, prompts, max_new_tokens=12, temperature=0.0)
    for prompt, new in zip(prompts, made, strict=True):
        assert len(new) == 12 or new[-1] == model.eod
        tokens = np.zeros((1, 32), np.int32)
        tokens[0, : len(prompt)] = prompt
        for place, token in enumerate(new, len(prompt)):
            assert token == forward(tokens)[0, place - 1].argmax()
            tokens[0, place] = token


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_that_of_what_stays_in_floats(quantized, dtype) -> None:
    for parameter, value in items(pj.load(quantized, dtype=dtype).params):
        if isinstance(value, Quantized):
            assert (value.values.dtype, value.scale.dtype) == (np.int8, np.float32)
            assert value.dtype == dtype, parameter.path
        else:
            assert value.dtype == dtype, parameter.path


@pytest.mark.parametrize("kind", ["orbax", "neox"])
def test_any_kind_of_checkpoint_becomes_the_same_file(theirs, quantized, tmp_path, kind) -> None:
    convert(theirs, tmp_path / "other", to=kind, step=3, dtype="float32", **HOW)
    if kind == "neox":  # which keeps float16
        convert(tmp_path / "other", tmp_path / "hf", dtype="float32", **HOW)
        pj.quantize(tmp_path / "hf", tmp_path / "wanted", **HOW)
        quantized = tmp_path / "wanted"
    pj.quantize(tmp_path / "other", tmp_path / "int8", step=3, dtype="float32", **HOW)
    assert (tmp_path / "int8" / WEIGHTS).read_bytes() == (quantized / WEIGHTS).read_bytes()


def test_shards_are_whole_together_and_opened_as_one(theirs, quantized, tmp_path) -> None:
    from pythia_jax.bridge.int8 import Scheme

    hf_out.save(open_any(theirs), tmp_path / "cut", max_shard_size=5000, scheme=Scheme())
    files = sorted((tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 4
    together = {name: value for file in files for name, value in load_file(file).items()}
    whole = load_file(quantized / WEIGHTS)
    assert together.keys() == whole.keys()
    assert all(torch.equal(together[name], whole[name]) for name in whole)
    index = json.loads((tmp_path / "cut" / f"{WEIGHTS}.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in whole.values())
    tokens = random_tokens(TINY, 1, 8)
    np.testing.assert_array_equal(
        our_logits(pj.load(tmp_path / "cut"), tokens), our_logits(pj.load(quantized), tokens)
    )


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_it_is_written_out_in_floats_again(quantized, tmp_path, dtype) -> None:
    convert(quantized, tmp_path / "converted", dtype=dtype, **HOW)
    pj.save_hf(pj.load(quantized), tmp_path / "saved", dtype=dtype)
    for name in ("converted", "saved"):
        found = load_file(tmp_path / name / WEIGHTS)
        for tensor, value in floats(quantized).items():
            assert torch.equal(found[tensor], value.to(getattr(torch, dtype))), (name, tensor)
        assert "quantization_config" not in json.loads(
            (tmp_path / name / "config.json").read_text()
        )
        # It is still said that the weights were rounded.
        assert (
            "| Were rounded to | all matrices in int8"
            in (tmp_path / name / "README.md").read_text()
        )


def test_a_run_that_begins_from_it_begins_with_floats(quantized) -> None:
    opened = open_any(quantized)
    assert {leaf.dtype for leaf in jax.tree.leaves(opened.params())} == {np.dtype(np.float32)}


def test_activations_and_embeddings_as_asked(theirs, tmp_path) -> None:
    pj.quantize(theirs, tmp_path / "a", activations="dynamic", keep_embeddings=True, **HOW)
    model = pj.load(tmp_path / "a")
    for parameter, value in items(model.params):
        is_int8 = isinstance(value, Quantized)
        assert is_int8 == (parameter.stacked and parameter.path.endswith("kernel"))
        assert not is_int8 or value.dynamic
    groups = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert groups["ignore"] == ["embed_out", "lm_head"]
    assert [group["targets"] for group in groups["config_groups"].values()] == [["Linear"]]
    assert groups["config_groups"]["group_0"]["input_activations"]["dynamic"] is True
    tokens = random_tokens(TINY, 2, 20)
    found, wanted = our_logits(model, tokens), our_logits(pj.load(theirs), tokens)
    assert 1e-4 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.02


THEIRS = """
import sys
import numpy as np, torch, transformers

model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    np.save(sys.argv[3], model(torch.tensor(np.load(sys.argv[2]))).logits.numpy())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activations", "least", "most"),
    [
        ("float", 0, 5e-4),
        # Theirs are rounded to 1 part in 127.5 of the largest, ours in 127.
        ("dynamic", 1e-3, 0.02),
    ],
)
def test_compressed_tensors_opens_it_and_gives_our_logits(
    theirs, tmp_path, activations, least, most
) -> None:
    python = PEERS_VENV / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"no compressed-tensors: no {PEERS_VENV} (make test-all makes one)")
    pj.quantize(theirs, tmp_path / "int8", activations=activations, **HOW)
    tokens = random_tokens(TINY, 2, 40)
    np.save(tmp_path / "tokens.npy", tokens.astype(np.int64))
    (tmp_path / "theirs.py").write_text(THEIRS)
    places = [tmp_path / name for name in ("theirs.py", "int8", "tokens.npy", "logits.npy")]
    done = subprocess.run(
        [python, *places],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    wanted = np.load(tmp_path / "logits.npy")
    found = our_logits(pj.load(tmp_path / "int8"), tokens)
    assert least <= np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < most


@pytest.mark.parametrize("size", ["410m", "1b", "1.4b", "2.8b", "6.9b", "12b"])
def test_bytes_are_few_enough_from_410m_on(size) -> None:
    config = ModelConfig.from_size(size)
    h, layers, vocab = config.hidden_size, config.num_hidden_layers, config.vocab_size
    matrices, channels = 12 * h * h * layers + 2 * vocab * h, 9 * h * layers + 2 * vocab
    others = 13 * h * layers + 2 * h
    total = matrices + others
    scales = 4 * channels
    assert (matrices + scales + 4 * others) / (4 * total) <= 0.30
    assert (matrices + scales + 2 * others) / (2 * total) <= 0.55
    # The formula is that of the files.
    from pythia_jax.bridge.int8 import Scheme
    from pythia_jax.evaluation.quantized import sizes

    opened = Opened(config, lambda *_: np.zeros(0), "float16", "")
    assert sizes(opened, Scheme(), "float16") == {
        "int8": matrices + scales + 2 * others, "float16": 2 * total, "float32": 4 * total,
    }  # fmt: skip


def test_what_cannot_be_quantized_is_refused_and_leaves_nothing(
    theirs, quantized, tmp_path
) -> None:
    target = tmp_path / "target"
    how: Any
    for how, message in (
        ({"bits": 4}, r"bits \(--bits\) 4: only 8"),
        ({"activations": "int8"}, r"activations \(--activations\) 'int8' is not one of float, dyn"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of"),
    ):
        with pytest.raises(ValueError, match=message):
            pj.quantize(theirs, target, **how, **HOW)
    with pytest.raises(ValueError, match="is in int8 already"):
        pj.quantize(quantized, target, **HOW)
    with pytest.raises(ValueError, match="lies there, and would be lost"):
        pj.quantize(theirs, theirs, **HOW)
    with pytest.raises(ValueError, match="folders of this machine"):
        pj.quantize(theirs, "gs://bucket/model", **HOW)
    opened = open_any(theirs)

    def spoiled(parameter, layer):
        value = opened.read(parameter, layer).copy()
        if parameter.path == "layers/mlp/dense_4h_to_h/kernel" and layer == 1:
            value[3, 4] = np.nan
        return value

    hf_out.save(dataclasses.replace(opened, read=spoiled), tmp_path / "spoiled")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.dense_4h_to_h\.weight: .* not finite"):
        pj.quantize(tmp_path / "spoiled", target, **HOW)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spoiled"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("embed_out.weight_scale"), "missing: embed_out.weight_scale"),
        (
            lambda t: t.update({"embed_out.weight_scale": torch.ones(TINY.vocab_size)}),
            r"embed_out.weight_scale has shape \(130,\)",
        ),
        (
            lambda t: t.update(
                {"gpt_neox.layers.1.mlp.dense_h_to_4h.bias": torch.ones(192).char()}
            ),
            "dense_h_to_4h.bias holds int8, not floats",
        ),
        (
            lambda t: t.update({n: v.float() for n, v in t.items() if v.dtype == torch.int8}),
            "none of the weights is int8",
        ),
        (
            lambda t: (
                t.pop("gpt_neox.layers.1.attention.dense.weight_scale"),
                t.update({"gpt_neox.layers.1.attention.dense.weight": torch.ones(48, 48)}),
            ),
            "missing: gpt_neox.layers.1.attention.dense.weight_scale",
        ),
        (
            lambda t: t.update({"gpt_neox.layers.1.attention.dense.weight": torch.ones(48, 48)}),
            "layers.1.attention.dense.weight holds float32, and has a scale",
        ),
    ],
)
def test_weights_that_do_not_go_with_the_config_are_named(quantized, tmp_path, spoil, message):
    tensors = load_file(quantized / WEIGHTS)
    spoil(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_bytes((quantized / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=message):
        pj.load(tmp_path)


def test_other_quantisations_are_refused_by_name(quantized, folder) -> None:
    config = json.loads((folder / "config.json").read_text())
    ours = json.loads((quantized / "config.json").read_text())["quantization_config"]
    groups = ours["config_groups"]
    one = {**groups["group_0"], "weights": {**groups["group_0"]["weights"], "num_bits": 4}}
    mixed = {**groups["group_0"], "input_activations": {"num_bits": 8}}
    for other in (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {**ours, "format": "pack-quantized"},
        {**ours, "config_groups": {**groups, "group_0": one}},
        {**ours, "config_groups": {**groups, "group_0": mixed}},
        {**ours, "config_groups": {}},
        "int8",
    ):
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": other}))
        with pytest.raises(ConfigError, match="quantization_config: only int8 weights"):
            pj.load(folder)


MESH = """
import sys
import jax, numpy as np
import pythia_jax as pj
from pythia_jax import sharding
from pythia_jax.configs import MeshConfig
from pythia_jax.evaluation.scoring import Scorer

tokens = np.random.default_rng(0).integers(0, 128, (4, 20)).astype(np.int32)
alone = pj.load(sys.argv[1])
forward = jax.jit(lambda params: pj.forward(params, tokens, alone.config))
wanted = forward(alone.params)
mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
with jax.set_mesh(mesh):
    model = pj.load(sys.argv[1])
    qkv = model.params["layers"]["attention"]["query_key_value"]["kernel"]
    embedding = model.params["embed_in"]["embedding"]
    shards = [array.addressable_shards[0].data.shape for array in jax.tree.leaves((qkv, embedding))]
    assert shards == [(2, 96, 32), (2, 96), (64, 32), (64,)]
    found = forward(model.params)
    assert np.linalg.norm(found - wanted) < 1e-4 * np.linalg.norm(wanted)
    requests = [(row[:-1].tolist(), [int(row[-1])]) for row in tokens]
    scores = [score for score, _ in Scorer(model).loglikelihoods(requests)]
chosen = np.take_along_axis(jax.nn.log_softmax(wanted)[:, -2], tokens[:, -1:], 1)[:, 0]
np.testing.assert_allclose(scores, chosen, rtol=1e-3)
"""


def test_on_eight_devices_each_has_its_part(tmp_path) -> None:
    config = dataclasses.replace(
        TINY, hidden_size=64, num_attention_heads=4, vocab_size=128, num_hidden_layers=2,
        intermediate_size=256,
    )  # fmt: skip
    write_theirs(tmp_path / "hf", config)
    pj.quantize(tmp_path / "hf", tmp_path / "int8", **HOW)
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, "-c", MESH, str(tmp_path / "int8")], env=environment, check=True
    )


STREAMED = """
import re, sys
from pathlib import Path
import pythia_jax as pj
from pythia_jax.bridge.convert import open_any

def peak():  # of this program alone: getrusage's goes on from its parent's
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

open_any(sys.argv[1])
before = peak()
pj.quantize(sys.argv[1], sys.argv[2], show_progress=False)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_in_memory_is_one_matrix_and_not_the_model(tmp_path) -> None:
    config = dataclasses.replace(
        TINY, hidden_size=512, num_attention_heads=8, vocab_size=8192, num_hidden_layers=16,
        intermediate_size=2048,
    )  # fmt: skip
    kept = {}

    def read(parameter, layer):
        shape = parameter.shape(config)[int(parameter.stacked) :]
        if shape not in kept:
            kept[shape] = np.random.default_rng(0).standard_normal(shape, np.float32)
        return kept[shape]

    hf_out.save(Opened(config, read, "float32", "the test"), tmp_path / "hf")
    size = (tmp_path / "hf" / WEIGHTS).stat().st_size
    largest = 4 * 8192 * 512
    assert size > 2e8 > 10 * largest
    command = [sys.executable, "-c", STREAMED, str(tmp_path / "hf"), str(tmp_path / "int8")]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    # Several are read at once, each beside its int8, up to the size of the largest in int8.
    assert int(ran.stdout) < 0.4 * size


def test_gradients_by_int8_are_refused_in_words(quantized) -> None:
    model = pj.load(quantized)
    tokens = random_tokens(TINY, 2, 9)
    key, metric = jax.random.key(0), pj.interp.token_loss()
    zero = {"mlp_out": np.zeros((TINY.num_hidden_layers, 2, 8, TINY.hidden_size), np.float32)}
    for found in (
        lambda: pj.interp.per_example_gradients(model.params, tokens, TINY),
        lambda: jax.grad(lambda taps: pj.loss(model.params, tokens, TINY, taps=taps))(zero),
        lambda: pj.interp.activation_gradients(model.params, tokens, TINY, metric, ["resid_post"]),
        lambda: pj.interp.hvp(model.params, tokens, TINY, model.params),
        lambda: pj.interp.hessian_top_eigenvalues(model.params, tokens, TINY, 1, 2, key),
    ):
        with pytest.raises(ValueError, match="model is in int8, which there are no gradients by"):
            found()


def test_a_model_in_floats_is_not_written_over(theirs, quantized, tmp_path) -> None:
    pj.save_hf(pj.load(theirs), tmp_path / "floats")
    before = (tmp_path / "floats" / WEIGHTS).read_bytes()
    with pytest.raises(FileExistsError, match="floats: holds a model in floats, whose place"):
        pj.quantize(theirs, tmp_path / "floats", **HOW)
    assert (tmp_path / "floats" / WEIGHTS).read_bytes() == before
    for activations in ("dynamic", "float"):  # one in int8 is replaced
        pj.quantize(theirs, tmp_path / "int8", activations=activations, **HOW)
    assert (tmp_path / "int8" / WEIGHTS).read_bytes() == (quantized / WEIGHTS).read_bytes()


def test_models_that_compute_otherwise_have_other_hashes(quantized, theirs, tmp_path) -> None:
    pj.quantize(theirs, tmp_path / "dynamic", activations="dynamic", **HOW)
    models = [pj.load(folder) for folder in (quantized, tmp_path / "dynamic", theirs)]
    assert len({weights_hash(model.params) for model in models}) == 3
