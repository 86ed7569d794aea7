"""Hugging Face folders: what comes in goes out with the same names, dtypes and bytes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_folders import TORCH_DTYPES, load_theirs, our_logits, our_model, stored, write_theirs
from reference import TINY, hf_logits, random_tokens
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

import pythia_jax as pj
from pythia_jax.model import parameters

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


# The tokenizer.

PILE_TOKENIZER = Path(__file__).parents[2].parent / "shared" / "data" / "20B_tokenizer.json"
END = "<|endoftext|>"


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


def test_tokenizer_files_come_and_go_byte_for_byte(folder, tmp_path):
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes(b'{"bos_token":   "<|endoftext|>"}\r\n')
    model = pj.load(folder)
    pj.save_hf(model, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert model.tokenizer is not None and model.tokenizer.token_to_id(END) == model.eod == 0


def test_texts_are_read_whole_whatever_the_tokenizer_cuts_or_fills_up(folder):
    tokenizer = tiny_tokenizer()
    wanted = tokenizer.encode("the cat sat on the mat").ids
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=30)
    tokenizer.save(str(folder / "tokenizer.json"))
    found = pj.load(folder).tokenizer
    assert found is not None and len(wanted) > 3
    assert found.encode("the cat sat on the mat").ids == wanted


def test_model_without_tokenizer_says_none(theirs):
    model = pj.load(theirs)
    assert model.tokenizer is None and model.tokenizer_files == {} and model.eod == 0


def test_tokenizer_without_an_end_of_text_exports_no_such_token_and_says_so(tmp_path, caplog):
    content = tiny_tokenizer("<s>").to_str().encode()
    pj.save_hf(our_model(tokenizer_files={"tokenizer.json": content}), tmp_path / "out")
    assert "its tokenizer has no <|endoftext|>" in caplog.text
    theirs = load_theirs(tmp_path / "out").eval()
    for config in (theirs.config, theirs.generation_config):
        assert (config.bos_token_id, config.eos_token_id) == (None, None)
    prompt = torch.tensor([[5, 6, 7]])
    made = theirs.generate(prompt, max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert made.shape == (1, 12)
    assert pj.load(tmp_path / "out").config == TINY


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
