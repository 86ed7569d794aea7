"""Hugging Face folders: what comes in goes out with the same names, dtypes and bytes."""

import json
import os
import re
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import TINY, hf_logits, hf_model, random_params, random_tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

import pythia_jax as pj
from pythia_jax.bridge import CheckpointError, Model, hf
from pythia_jax.configs import ConfigError, ModelConfig
from pythia_jax.model import parameters
from pythia_jax.model.gptneox import forward

PILE_TOKENIZER = Path(__file__).parents[2].parent / "shared" / "data" / "20B_tokenizer.json"
END = "<|endoftext|>"
load_theirs: Any = AutoModelForCausalLM.from_pretrained
TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def write_theirs(folder, config=TINY, dtype="float32", **how):
    """A folder as transformers writes it."""
    model: Any = hf_model(random_params(config), config)
    model.to(TORCH_DTYPES[dtype]).save_pretrained(folder, **how)
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return write_theirs(tmp_path_factory.mktemp("theirs") / "model")


@pytest.fixture
def folder(theirs, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(theirs, tmp_path / "model"))


def stored(folder):
    """Name → (dtype, shape, bytes) of every tensor in the folder's safetensors files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            assert name not in found
            raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            found[name] = (str(tensor.dtype), tuple(tensor.shape), raw)
    return found


def change_tensors(folder, change):
    """Rewrite model.safetensors through `change(dict)`."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def change_config(folder, drop=(), **values):
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in raw.items() if key not in drop}))


def our_logits(model, tokens):
    return np.asarray(jax.jit(lambda p: forward(p, tokens, model.config))(model.params))


def tiny_tokenizer(special=END):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=120,
        special_tokens=[special],
        initial_alphabet=sorted(set("abcdefghijklmnopqrstuvwxyz .,Ġ")),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, the end. " * 20], trainer)
    assert tokenizer.token_to_id(special) == 0
    return tokenizer


def our_model(config=TINY, **fields):
    return Model(params=random_params(config), config=config, **fields)


# There and back.


@pytest.mark.parametrize("shard", [None, "40KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_theirs_through_ours_keeps_names_dtypes_and_bytes(dtype, shard, tmp_path):
    how = {} if shard is None else {"max_shard_size": shard}
    source = write_theirs(tmp_path / "theirs", dtype=dtype, **how)
    assert (len(list(source.glob("*.safetensors"))) > 1) == (shard is not None)
    model = pj.load(source)
    assert model.stored_dtype == dtype
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(model.params))
    expected = stored(source)
    assert len(expected) == 4 + 12 * TINY.num_hidden_layers
    assert {kind for kind, _, _ in expected.values()} == {f"torch.{dtype}"}
    for size in (None, 40_000, 1):
        pj.save_hf(model, tmp_path / "ours", max_shard_size=size)
        assert stored(tmp_path / "ours") == expected
        again = pj.load(tmp_path / "ours")
        assert again.config == model.config == TINY
        assert again.stored_dtype == dtype
        same = jax.tree.map(lambda a, b: bool((a == b).all()), again.params, model.params)
        assert all(jax.tree.leaves(same))


def test_weights_of_transformers_land_where_the_function_is_the_same(theirs):
    model, tokens = pj.load(theirs), random_tokens(TINY, 2, 30)
    reference = load_theirs(theirs, dtype=torch.float32).eval()
    assert np.abs(our_logits(model, tokens) - hf_logits(reference, tokens)).max() <= 2e-5


@pytest.mark.parametrize("asked", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_parameters_come_in_the_dtype_asked_for_and_leave_in_the_stored_one(
    asked, theirs, tmp_path
):
    model = pj.load(theirs, dtype=asked)
    assert all(leaf.dtype == asked for leaf in jax.tree.leaves(model.params))
    pj.save_hf(model, tmp_path / "out")
    assert {kind for kind, _, _ in stored(tmp_path / "out").values()} == {"torch.float32"}


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_export_in_another_dtype_is_rounded_once_and_says_so(dtype, theirs, tmp_path):
    pj.save_hf(pj.load(theirs), tmp_path / "out", dtype=dtype)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in load_file(theirs / "model.safetensors").items():
        assert torch.equal(ours[name], tensor.to(TORCH_DTYPES[dtype]))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    assert load_theirs(tmp_path / "out").dtype == TORCH_DTYPES[dtype]


def test_shards_are_no_larger_than_asked_and_transformers_loads_them(tmp_path):
    model, limit = our_model(), 40_000
    pj.save_hf(model, tmp_path / "out", max_shard_size=limit)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    total = 0
    for file in files:
        tensors = load_file(tmp_path / "out" / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == set(
            tensors
        )
        size = sum(t.nbytes for t in tensors.values())
        assert size <= limit or len(tensors) == 1
        total += size
        with safe_open(tmp_path / "out" / file, framework="numpy") as handle:
            assert handle.metadata() == {"format": "pt"}
    assert index["metadata"]["total_size"] == total == 4 * parameters.count(TINY)
    tokens = random_tokens(TINY, 1, 20)
    reference = load_theirs(tmp_path / "out").eval()
    assert np.abs(our_logits(model, tokens) - hf_logits(reference, tokens)).max() <= 2e-5


# Out: what transformers makes of it.


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, hidden_act="gelu_pytorch_tanh"),
        replace(TINY, use_parallel_residual=False, rotary_pct=1.0, rotary_emb_base=500.0),
        replace(TINY, intermediate_size=100, layer_norm_eps=1e-3, vocab_size=131),
    ],
    ids=["exact", "tanh", "sequential", "odd"],
)
def test_exported_folder_computes_the_same_function_in_transformers(config, tmp_path):
    model, tokens = our_model(config), random_tokens(config, 2, 30)
    pj.save_hf(model, tmp_path / "out")
    reference, report = load_theirs(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert np.abs(our_logits(model, tokens) - hf_logits(reference.eval(), tokens)).max() <= 2e-5
    assert reference.config.hidden_act == config.hidden_act
    assert (reference.config.bos_token_id, reference.config.eos_token_id) == (0, 0)
    assert reference.generation_config.eos_token_id == 0
    assert pj.load(tmp_path / "out").config == config


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
def test_export_names_the_activation_that_was_trained(activation, tmp_path):
    pj.save_hf(our_model(replace(TINY, hidden_act=activation)), tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["hidden_act"] == activation
    assert raw["architectures"] == ["GPTNeoXForCausalLM"]
    # Old and new names of the same fields, for every release of transformers.
    assert (raw["rotary_pct"], raw["rotary_emb_base"]) == (0.25, 10000.0)
    assert raw["rope_parameters"]["partial_rotary_factor"] == 0.25
    assert raw["rope_parameters"]["rope_theta"] == 10000.0


def test_files_of_an_export_without_tokenizer(tmp_path):
    pj.save_hf(our_model(), tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors"}
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (0, 0)


def test_exported_model_generates_greedily_what_ours_ranks_first(tmp_path):
    model, tokens = our_model(), random_tokens(TINY, 1, 10)
    pj.save_hf(model, tmp_path / "out")
    reference = load_theirs(tmp_path / "out").eval()
    wanted = reference.generate(torch.tensor(tokens).long(), max_new_tokens=6, do_sample=False)
    ranked_first = our_logits(model, wanted[:, :-1].numpy())[:, 9:].argmax(-1)
    np.testing.assert_array_equal(ranked_first, wanted[:, 10:].numpy())


# The tokenizer.


def test_tokenizer_files_come_and_go_byte_for_byte(folder, tmp_path):
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes(b'{"bos_token":   "<|endoftext|>"}\r\n')
    model = pj.load(folder)
    pj.save_hf(model, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert model.tokenizer is not None and model.tokenizer.token_to_id(END) == model.eod == 0


def test_model_without_tokenizer_says_none(theirs):
    model = pj.load(theirs)
    assert model.tokenizer is None and model.tokenizer_files == {} and model.eod == 0


@pytest.mark.parametrize("which", ["tiny", "pile"])
def test_exported_tokenizer_loads_in_transformers_and_encodes_alike(which, tmp_path):
    if which == "pile" and not PILE_TOKENIZER.is_file():
        pytest.skip("the Pile's tokenizer is not on this machine")
    content = PILE_TOKENIZER.read_bytes() if which == "pile" else tiny_tokenizer().to_str().encode()
    raw = Tokenizer.from_buffer(content)
    pj.save_hf(our_model(tokenizer_files={"tokenizer.json": content}), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == content
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.bos_token_id) == (END, 0, 0)
    assert len(tokenizer) == raw.get_vocab_size()
    assert tokenizer.model_max_length == TINY.max_position_embeddings
    for text in ("the cat sat.", " on the  mat", f"the end{END}the cat", "", " .,"):
        ids = tokenizer(text)["input_ids"]
        assert ids == raw.encode(text).ids
        assert tokenizer.decode(ids) == raw.decode(ids, skip_special_tokens=False)


def test_end_of_document_that_is_not_0_is_exported_as_it_is(tmp_path):
    tokenizer = tiny_tokenizer("<|first|>")
    tokenizer.add_special_tokens([END])
    model = our_model(tokenizer_files={"tokenizer.json": tokenizer.to_str().encode()})
    assert model.eod == tokenizer.token_to_id(END) != 0
    pj.save_hf(model, tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        raw = json.loads((tmp_path / "out" / name).read_text())
        assert raw["eos_token_id"] == raw["bos_token_id"] == model.eod


def test_broken_tokenizer_file_does_not_keep_the_weights_from_loading(folder):
    (folder / "tokenizer.json").write_bytes(b"{ not a tokenizer")
    model = pj.load(folder)
    assert model.config == TINY
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        _ = model.tokenizer


# In: the forms that config.json has had.

OLD = {"rotary_pct": 0.5, "rotary_emb_base": 500, "torch_dtype": "float16"}
MIDDLE = {"partial_rotary_factor": 0.5, "rope_theta": 500, "rope_scaling": None}
NEW = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
}


@pytest.mark.parametrize(
    "form",
    [OLD, MIDDLE, NEW, {**OLD, **MIDDLE}, {**OLD, **NEW}, {**OLD, **MIDDLE, **NEW}],
    ids=["old", "4.4x", "5", "old and 4.4x", "old and 5", "all"],
)
def test_rotary_fields_are_read_in_every_form(form, folder):
    change_config(folder, drop=("rope_parameters",))
    change_config(folder, **form)
    assert pj.load(folder).config == replace(TINY, rotary_pct=0.5, rotary_emb_base=500.0)


def test_config_without_optional_fields_has_the_defaults_of_transformers(folder):
    optional = ("rope_parameters", "hidden_act", "layer_norm_eps", "use_parallel_residual", "dtype")
    change_config(folder, drop=(*optional, "max_position_embeddings"))
    assert pj.load(folder).config == replace(TINY, max_position_embeddings=2048)


def test_loaded_config_keeps_the_activation_it_names(folder):
    change_config(folder, hidden_act="gelu_fast")
    assert pj.load(folder).config == replace(TINY, hidden_act="gelu_fast")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, "'llama'.*'gpt_neox'"),
        ({"model_type": None}, "None.*'gpt_neox'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"attention_bias": False}, "attention_bias"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "'linear'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"hidden_act": "relu"}, "'relu'"),
        ({"num_attention_heads": 5}, "num_attention_heads: 5"),
        ({"hidden_size": "48"}, "hidden_size: '48'"),
        ({"hidden_size": None}, "hidden_size: None"),
        ({"hidden_size": 48.0}, "hidden_size: 48.0"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps: 'small'"),
        ({"use_parallel_residual": "no"}, "use_parallel_residual: 'no'"),
        ({"rotary_pct": 0.2}, r"rotary_pct: 0\.2"),
        ({"rope_parameters": "none"}, "rope_parameters"),
        ({"rotary_emb_base": 10**400}, "too large"),
        ({"rotary_emb_base": [1]}, "rotary_emb_base"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps"),
        ({"hidden_act": ["gelu"]}, "hidden_act"),
    ],
    ids=str,
)
def test_config_that_cannot_be_is_an_error_that_names_file_and_value(values, message, folder):
    change_config(folder, **values)
    with pytest.raises(ConfigError, match=message) as error:
        pj.load(folder)
    assert str(error.value).startswith(f"{folder / 'config.json'}: ")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 10_000], ids=range(6)
)
def test_config_that_is_no_json_object_is_an_error_that_names_the_file(content, folder):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        pj.load(folder)


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_missing_field_of_the_config_is_named(field, folder):
    change_config(folder, drop=(field,))
    with pytest.raises(ConfigError, match=f"{field}.*missing"):
        pj.load(folder)


# In: weights with something more, less or wrong.


def test_buffers_of_old_releases_are_ignored(folder):
    def add(tensors):
        for layer in range(TINY.num_hidden_layers):
            name = f"gpt_neox.layers.{layer}.attention"
            tensors[f"{name}.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
            tensors[f"{name}.masked_bias"] = torch.tensor(-1e9)
            tensors[f"{name}.rotary_emb.inv_freq"] = torch.ones(2)

    expected = pj.load(folder)
    change_tensors(folder, lambda tensors: None)
    change_tensors(folder, add)
    model = pj.load(folder)
    assert model.stored_dtype == "float32"
    same = jax.tree.map(lambda a, b: bool((a == b).all()), model.params, expected.params)
    assert all(jax.tree.leaves(same))


def test_unembedding_may_be_called_lm_head(folder, theirs, tmp_path):
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t.pop("embed_out.weight")}))
    pj.save_hf(pj.load(folder), tmp_path / "out")
    assert stored(tmp_path / "out") == stored(theirs)


def test_unembedding_under_both_names_is_an_error(folder):
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["embed_out.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is .* as embed_out\.weight"):
        pj.load(folder)


def test_missing_surplus_and_misshapen_tensors_stand_in_one_error(folder):
    def spoil(tensors):
        del tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.bias"]
        tensors["gpt_neox.layers.3.attention.dense.bias"] = torch.zeros(48)
        tensors["gpt_neox.final_layer_norm.weight"] = torch.zeros(47)

    change_tensors(folder, spoil)
    with pytest.raises(CheckpointError) as error:
        pj.load(folder)
    message = str(error.value)
    assert "missing: gpt_neox.layers.1.mlp.dense_h_to_4h.bias" in message
    assert "surplus: gpt_neox.layers.3.attention.dense.bias" in message
    assert "gpt_neox.final_layer_norm.weight has shape (47,)" in message and "(48,)" in message
    assert str(folder) in message and "\n" not in message


def test_transposed_kernel_is_an_error_and_not_turned_round(folder):
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
    change_tensors(folder, lambda t: t.update({name: t[name].T.contiguous()}))
    with pytest.raises(CheckpointError, match=r"shape \(48, 192\).*wants \(192, 48\)"):
        pj.load(folder)


def test_many_missing_tensors_are_counted(folder):
    change_config(folder, num_hidden_layers=5)
    with pytest.raises(CheckpointError, match=r"missing: .* and 16 more"):
        pj.load(folder)


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.bool])
def test_weights_that_are_no_floats_are_an_error(kind, folder):
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
    change_tensors(folder, lambda t: t.update({name: t[name].to(kind)}))
    with pytest.raises(CheckpointError, match=name):
        pj.load(folder)


def test_float64_weights_are_taken_and_stored_as_float32(folder):
    change_tensors(folder, lambda t: t.update({name: t[name].double() for name in t}))
    model = pj.load(folder)
    assert model.stored_dtype == "float32"


def test_weights_of_mixed_dtypes_are_stored_in_the_widest(folder):
    change_tensors(folder, lambda t: t.update({name: t[name].half() for name in list(t)[:5]}))
    assert pj.load(folder).stored_dtype == "float32"


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated_safetensors_are_an_error_that_names_the_file(keep, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable"):
        pj.load(folder)


def test_missing_shard_is_named(tmp_path):
    folder = write_theirs(tmp_path / "sharded", max_shard_size="40KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"not there: {shard.name}"):
        pj.load(folder)


def test_index_that_promises_what_a_shard_lacks_is_an_error(tmp_path):
    folder = write_theirs(tmp_path / "sharded", max_shard_size="40KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["gpt_neox.more"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"promises gpt_neox\.more"):
        pj.load(folder)


@pytest.mark.parametrize(
    "content",
    [
        *(b"{", b"{}", b"[]", b"\xff", b"[" * 100_000),
        *(b'{"weight_map": 3}', b'{"weight_map": []}', b'{"weight_map": {}}'),
        *(b'{"weight_map": {"a": 3}}', b'{"weight_map": {"a": null}}'),
        *(b'{"weight_map": {"a": ["b"]}}', b'{"weight_map": {"a": ""}}'),
        *(b'{"weight_map": {"a": "."}}', b'{"weight_map": {"a": "config.json"}}'),
        *(b'{"weight_map": {"a": "\\u0000"}}', b'{"weight_map": {"a": "\\ud800"}}'),
    ],
    ids=lambda content: str(content[:30]),
)
def test_index_that_is_none_is_an_error_that_names_it(content, folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json|config\.json"):
        pj.load(folder)


@pytest.mark.parametrize("place", ["../other.safetensors", "/etc/other.safetensors"])
def test_index_that_points_out_of_the_folder_is_refused(place, folder):
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    weight_map = dict.fromkeys(stored(folder.parent), place)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        pj.load(folder)


def test_folder_without_weights_says_what_was_looked_for(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        pj.load(folder)


def test_nothing_there_and_something_else_there_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        pj.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="neither"):
        pj.load(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileNotFoundError):
        pj.load(tmp_path / "file")


def test_scalar_in_the_place_of_a_weight_is_an_error(folder):
    name = "gpt_neox.final_layer_norm.bias"
    change_tensors(folder, lambda t: t.update({name: torch.tensor(1.0)}))
    with pytest.raises(CheckpointError, match=r"final_layer_norm\.bias has shape \(\)"):
        pj.load(folder)


@pytest.mark.parametrize(
    ("name", "how", "command"),
    [
        ("70m", {}, "hf download EleutherAI/pythia-70m --local-dir pythia-70m`"),
        ("pythia-19m", {}, "EleutherAI/pythia-70m "),
        ("EleutherAI/pythia-70m-deduped", {}, "EleutherAI/pythia-70m-deduped "),
        ("70m", {"step": 3000}, "EleutherAI/pythia-70m --revision step3000 "),
        ("someone/else", {"revision": "main"}, "someone/else --revision main "),
        (Path("EleutherAI/pythia-70m"), {"cache_dir": "cache"}, "EleutherAI/pythia-70m "),
    ],
    ids=str,
)
def test_model_on_the_hub_is_told_how_to_get(name, how, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="hub is not supported yet") as error:
        pj.load(name, **how)
    assert command in str(error.value) and "snapshot_download" in str(error.value)


@pytest.mark.parametrize("name", ["runs", "./a/b/c", "/70m/x", "~/model"])
def test_path_that_is_no_hub_id_is_just_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder") as error:
        pj.load(name)
    assert "hub" not in str(error.value)


def test_folder_goes_before_a_model_of_its_name(theirs, tmp_path, monkeypatch):
    shutil.copytree(theirs, tmp_path / "70m")
    monkeypatch.chdir(tmp_path)
    assert pj.load("70m", cache_dir=tmp_path / "cache").config == TINY


def test_revision_of_a_folder_is_an_error(theirs):
    with pytest.raises(ValueError, match="revision 'step3000'"):
        pj.load(theirs, revision="step3000")


@pytest.mark.parametrize("dtype", [np.float64, "float64", float], ids=str)
def test_float64_is_given_or_refused_but_never_made_float32(dtype, theirs):
    with pytest.raises(ValueError, match="JAX_ENABLE_X64"):
        pj.load(theirs, dtype=dtype)
    with jax.enable_x64(True):
        params = pj.load(theirs, dtype=dtype).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float64)}


@pytest.mark.parametrize("dtype", ["float7", np.int32, bool], ids=str)
def test_dtype_that_no_parameters_have_is_an_error(dtype, theirs):
    with pytest.raises(ValueError, match="float16, bfloat16, float32, float64"):
        pj.load(theirs, dtype=dtype)


def test_step_of_a_folder_that_has_one_checkpoint_is_an_error(theirs):
    with pytest.raises(ValueError, match="one checkpoint"):
        pj.load(theirs, step=3)


# Out: nothing is lost, nothing is left half-written.


def listing(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_export_replaces_an_older_model_whole(folder):
    pj.save_hf(our_model(), folder, max_shard_size=40_000)
    pj.save_hf(our_model(), folder, max_shard_size=80_000)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert shards == sorted(set(index["weight_map"].values()))
    pj.save_hf(our_model(), folder)
    assert not list(folder.glob("*0*.safetensors")) and not list(folder.glob("*.index.json"))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    "name",
    [
        *("pytorch_model.bin", "README.md", "notes.txt", "adapter_model.safetensors", ".git/HEAD"),
        *("logs/tokenizer.json", "tokenizer.json/part", "config.json.bak"),
    ],
)
def test_model_folder_with_anything_else_in_it_is_not_overwritten(name, folder):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("keep me")
    before = listing(folder.parent)
    with pytest.raises(FileExistsError, match=re.escape(Path(name).parts[0])):
        pj.save_hf(our_model(), folder)
    assert listing(folder.parent) == before


@pytest.mark.parametrize("content", ['{"model_type": "llama"}', "{}", "[]", "{"])
def test_model_of_another_kind_is_not_overwritten(content, folder):
    (folder / "config.json").write_text(content)
    before = listing(folder.parent)
    with pytest.raises(FileExistsError, match="not a GPT-NeoX model"):
        pj.save_hf(our_model(), folder)
    assert listing(folder.parent) == before


def kill_at_rename(monkeypatch, number, saving):
    """What a kill leaves just before the `number`th rename of a folder: nothing is cleaned up."""

    class Kill(BaseException):
        pass

    real, calls = Path.rename, []

    def rename(self, target):
        if self.is_dir():
            calls.append(self)
            if len(calls) >= number:
                raise Kill
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        patch.setattr(hf.os, "getpid", lambda: 2**22 + 1)  # more than Linux ever gives out
        # Somebody killed does not tidy up either.
        patch.setattr(hf.shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(Kill):
            saving()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_export_killed_as_it_moves_loses_nothing_and_is_put_right(number, folder, monkeypatch):
    before, place = stored(folder), folder.parent
    model = replace(our_model(), params=jax.tree.map(lambda x: x + 1, our_model().params))
    kill_at_rename(monkeypatch, number, lambda: pj.save_hf(model, folder))
    held = [
        stored(path)
        for path in place.iterdir()
        if not path.name.startswith(f".{folder.name}.partial")
    ]
    assert before in held
    if number == 2:
        assert not folder.exists()
        with pytest.raises(FileNotFoundError, match=r"whole in .*\.model\.replaced"):
            pj.load(folder)
        # One that fails puts back what was there.
        monkeypatch.setattr(hf, "_write_weights", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pj.save_hf(model, folder)
        assert stored(folder) == before
        monkeypatch.undo()
    pj.save_hf(model, folder)
    assert [path.name for path in place.iterdir()] == [folder.name]
    assert stored(folder) != before and stored(folder).keys() == before.keys()


def test_failed_second_rename_puts_the_first_back(folder, monkeypatch):
    before, real = listing(folder.parent), Path.rename

    def rename(self, target):
        if ".partial" in self.name:
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output"):
        pj.save_hf(our_model(), folder)
    assert listing(folder.parent) == before


def test_only_the_partial_folders_of_dead_processes_are_removed(tmp_path):
    dead, alive = f".out.partial-{2**22 + 1}", f".out.partial-{os.getppid()}"
    for name in (dead, alive, ".out.partial-mine", ".outer.partial-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard-0.safetensors").write_bytes(b"half")
    pj.save_hf(our_model(), tmp_path / "out")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"out", alive, ".out.partial-mine", ".outer.partial-1"}


def test_hidden_folder_of_somebody_else_is_not_deleted(folder):
    other = folder.parent / f".{folder.name}.replaced"
    other.mkdir()
    (other / "notes.txt").write_text("keep me")
    before = listing(folder.parent)
    with pytest.raises(FileExistsError, match=r"replaced.*notes\.txt"):
        pj.save_hf(our_model(), folder)
    assert listing(folder.parent) == before


def test_export_may_overwrite_the_folder_it_was_loaded_from(folder):
    before = stored(folder)
    pj.save_hf(pj.load(folder), folder)
    assert stored(folder) == before


@pytest.mark.parametrize("name", ["notes.txt", "sub/notes.txt", ".hidden"])
def test_folder_that_is_no_model_is_not_overwritten(name, tmp_path):
    target = tmp_path / "mine"
    (target / name).parent.mkdir(parents=True)
    (target / name).write_text("keep me")
    with pytest.raises(FileExistsError, match=f"mine.*{re.escape(name.split('/')[0])}"):
        pj.save_hf(our_model(), target)
    assert listing(tmp_path) == {f"mine/{name}": b"keep me"}


def test_file_in_the_way_is_not_overwritten(tmp_path):
    (tmp_path / "mine").write_text("keep me")
    with pytest.raises(FileExistsError, match="mine"):
        pj.save_hf(our_model(), tmp_path / "mine")
    assert listing(tmp_path) == {"mine": b"keep me"}


def test_empty_folder_and_new_folders_are_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    pj.save_hf(our_model(), tmp_path / "empty")
    pj.save_hf(our_model(), tmp_path / "a" / "b" / "c")
    assert stored(tmp_path / "empty") == stored(tmp_path / "a" / "b" / "c")


@pytest.mark.parametrize("name", ["out", "out/", "./out", "../here/out", "a.b", "link"])
def test_places_may_be_named_in_every_usual_way(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "elsewhere").mkdir()
    Path("link").symlink_to(tmp_path / "elsewhere")
    pj.save_hf(our_model(), name)
    assert {path.name for path in Path(name).iterdir()} >= {"config.json", "model.safetensors"}
    assert pj.load(name).config == TINY
    assert Path("link").is_symlink()


@pytest.mark.parametrize("name", [".", "", "../here"])
def test_current_folder_is_not_replaced_under_the_users_feet(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="current folder"):
        pj.save_hf(our_model(), name)


@pytest.mark.parametrize("existing", [False, True], ids=["new", "over an older model"])
def test_failed_export_leaves_what_was_there(existing, folder, monkeypatch):
    target = folder if existing else folder.parent / "new"
    before = listing(folder.parent)
    real, calls = hf.save_file, []

    def fail_at_the_third(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(hf, "save_file", fail_at_the_third)
    with pytest.raises(OSError, match="No space"):
        pj.save_hf(our_model(), target, max_shard_size=40_000)
    assert listing(folder.parent) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_unknown_dtype_is_an_error_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"'float8'.*float32, float16, bfloat16"):
        pj.save_hf(our_model(), tmp_path / "out", dtype="float8")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("dtype", [np.float64, "int8", "float64", int], ids=str)
def test_dtype_that_no_export_has_is_an_error(dtype, tmp_path):
    with pytest.raises(ValueError, match="float32, float16, bfloat16"):
        pj.save_hf(our_model(), tmp_path / "out", dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (jnp.bfloat16, "bfloat16"),
        (np.float16, "float16"),
        (jnp.dtype("bfloat16"), "bfloat16"),
        (np.dtype("float32"), "float32"),
    ],
    ids=str,
)
def test_export_takes_dtypes_as_well_as_their_names(dtype, name, tmp_path):
    pj.save_hf(our_model(), tmp_path / "out", dtype=dtype)
    assert {kind for kind, _, _ in stored(tmp_path / "out").values()} == {f"torch.{name}"}


def test_weights_are_cut_into_shards_without_being_asked(tmp_path, monkeypatch):
    assert hf.SHARD_BYTES == 5_000_000_000
    monkeypatch.setattr(hf, "SHARD_BYTES", 40_000)
    pj.save_hf(our_model(), tmp_path / "default")
    pj.save_hf(our_model(), tmp_path / "asked", max_shard_size=40_000)
    assert len(list((tmp_path / "default").glob("*.safetensors"))) > 1
    assert listing(tmp_path / "default") == listing(tmp_path / "asked")


def test_only_one_shard_is_in_memory(tmp_path, monkeypatch):
    sizes, alive, real = [], [], hf.save_file

    def save_file(pending, path, **how):
        # Arrays of the shards before are gone by the time that the next is written.
        assert all(ref() is None for ref in alive)
        alive[:] = [weakref.ref(value) for value in pending.values()]
        sizes.append(sum(value.nbytes for value in pending.values()))
        return real(pending, path, **how)

    monkeypatch.setattr(hf, "save_file", save_file)
    pj.save_hf(our_model(), tmp_path / "out", dtype="float16", max_shard_size=40_000)
    assert len(sizes) > 3 and max(sizes) <= 40_000


@pytest.mark.parametrize("size", [0, -1])
def test_shard_size_that_cannot_be_is_an_error(size, tmp_path):
    with pytest.raises(ValueError, match="max_shard_size"):
        pj.save_hf(our_model(), tmp_path / "out", max_shard_size=size)


def test_values_that_float16_cannot_hold_are_an_error(tmp_path):
    params = random_params(TINY)
    params["final_layer_norm"]["scale"] = params["final_layer_norm"]["scale"].at[3].set(1e5)
    model = Model(params=params, config=TINY)
    with pytest.raises(ValueError, match=r"final_layer_norm\.weight.*float16"):
        pj.save_hf(model, tmp_path / "out", dtype="float16")
    pj.save_hf(model, tmp_path / "out", dtype="bfloat16")


def test_suite_model_exports_the_shape_of_its_config(tmp_path):
    config = ModelConfig.from_size("14m", num_hidden_layers=1, vocab_size=256)
    pj.save_hf(our_model(config), tmp_path / "out", dtype="float16")
    loaded = pj.load(tmp_path / "out")
    assert loaded.config == config
    assert loaded.stored_dtype == "float16"
