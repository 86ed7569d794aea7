"""Hugging Face folders out: the same function in transformers; nothing lost or half-written."""

import json
import logging
import os
import re
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_folders import load_theirs, our_logits, our_model, stored, write_theirs
from reference import TINY, hf_logits, random_params, random_tokens

import pythia_jax as pj
from pythia_jax.bridge import Model, angles, hf_out
from pythia_jax.bridge.opened import from_model
from pythia_jax.configs import ModelConfig
from pythia_jax.model import parameters

# What transformers makes of it.


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


@pytest.mark.parametrize("limit", [None, 40_000])
def test_all_files_of_an_export_may_be_read_as_the_umask_says(limit, tmp_path):
    before = os.umask(0o027)
    try:
        pj.save_hf(our_model(), tmp_path / "out", max_shard_size=limit)
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {"0o640"}, modes


def test_files_of_an_export_without_tokenizer(tmp_path):
    pj.save_hf(our_model(), tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert files == expected
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (0, 0)


def test_exported_model_generates_greedily_what_ours_ranks_first(tmp_path):
    model, tokens = our_model(), random_tokens(TINY, 1, 10)
    pj.save_hf(model, tmp_path / "out")
    reference = load_theirs(tmp_path / "out").eval()
    wanted = reference.generate(torch.tensor(tokens).long(), max_new_tokens=6, do_sample=False)
    ranked_first = our_logits(model, wanted[:, :-1].numpy())[:, 9:].argmax(-1)
    np.testing.assert_array_equal(ranked_first, wanted[:, 10:].numpy())


# Nothing is lost, nothing is left half-written.


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


def test_export_killed_between_its_moves_is_told_of_and_put_right(folder):
    before = stored(folder)
    moved = folder.with_name(f".{folder.name}.replaced")
    folder.rename(moved)
    with pytest.raises(FileNotFoundError, match=r"whole in .*\.model\.replaced"):
        pj.load(folder)
    with pytest.raises(ValueError, match="float16"):
        pj.save_hf(too_large(), folder, dtype="float16")
    assert stored(folder) == before
    pj.save_hf(our_model(), folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


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


@pytest.mark.parametrize("name", ["out", "out/", "./out", "../here/out", "a.b"])
def test_places_may_be_named_in_every_usual_way(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    pj.save_hf(our_model(), name)
    assert {path.name for path in Path(name).iterdir()} >= {"config.json", "model.safetensors"}
    assert pj.load(name).config == TINY


@pytest.mark.parametrize("existing", [False, True], ids=["new", "over an older model"])
def test_failed_export_leaves_what_was_there(existing, folder):
    target = folder if existing else folder.parent / "new"
    before = listing(folder.parent)
    opened, read = from_model(our_model()), []

    def fail_at_the_tenth(parameter, layer):
        read.append(parameter)
        if len(read) == 10:
            raise OSError(5, "Input/output error")
        return opened.read(parameter, layer)

    failing = replace(opened, read=fail_at_the_tenth)
    with pytest.raises(OSError, match="Input/output"):
        hf_out.save(failing, target, max_shard_size=40_000)
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
    assert hf_out.SHARD_BYTES == 5_000_000_000
    monkeypatch.setattr(hf_out, "SHARD_BYTES", 40_000)
    pj.save_hf(our_model(), tmp_path / "default")
    pj.save_hf(our_model(), tmp_path / "asked", max_shard_size=40_000)
    assert len(list((tmp_path / "default").glob("*.safetensors"))) > 1
    assert listing(tmp_path / "default") == listing(tmp_path / "asked")


def test_no_more_is_in_memory_than_the_largest_tensor_holds(tmp_path):
    """Whatever the shards: values that were read live no longer than their writing."""
    opened, lock, alive, most = from_model(our_model()), threading.Lock(), [0], [0]

    class Counted(np.ndarray):
        """An array that tells when its memory is given back."""

    def read(parameter, layer):
        value = np.array(opened.read(parameter, layer)).view(Counted)

        def gone(size=value.nbytes):
            with lock:
                alive[0] -= size

        with lock:
            alive[0] += value.nbytes
            most[0] = max(most[0], alive[0])
        weakref.finalize(value, gone)
        return value

    hf_out.save(replace(opened, read=read), tmp_path / "out", dtype="float16")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1
    largest = 4 * TINY.vocab_size * TINY.hidden_size
    total = 4 * parameters.count(TINY)
    assert largest <= most[0] <= 2 * largest < total / 3
    names = [name for p in parameters.TABLE for name in p.hf_names(TINY)]
    assert stored(tmp_path / "out").keys() == set(names)


@pytest.mark.parametrize(
    ("limit", "theirs"),
    [("40KB", "40KB"), ("25kB", "25KB"), ("1MB", "1MB"), (1, 1), ("0.03 MiB", 31457)],
)
def test_shards_and_index_are_those_that_transformers_writes(limit, theirs, tmp_path):
    config = replace(TINY, num_hidden_layers=11)
    theirs = write_theirs(tmp_path / "theirs", config, max_shard_size=theirs)
    pj.save_hf(our_model(config), tmp_path / "ours", max_shard_size=limit)
    for path in theirs.glob("model*"):
        assert (tmp_path / "ours" / path.name).read_bytes().rstrip() == path.read_bytes().rstrip()
    assert {p.name for p in (tmp_path / "ours").glob("model*")} == {
        p.name for p in theirs.glob("model*")
    }


@pytest.mark.parametrize(
    ("size", "count"),
    [(7, 7), ("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5KB", 1500), ("2GiB", 2**31)],
)
def test_shard_size_is_bytes_or_text(size, count):
    assert hf_out.shard_bytes(size) == count


@pytest.mark.parametrize("size", [0, -1, "", "GB", "5 apples", "5GB5", 1.5, "0.1B", "inf"])
def test_shard_size_that_cannot_be_is_an_error(size, tmp_path):
    with pytest.raises(ValueError, match="max_shard_size"):
        pj.save_hf(our_model(), tmp_path / "out", max_shard_size=size)


def too_large():
    params = random_params(TINY)
    params["final_layer_norm"]["scale"] = params["final_layer_norm"]["scale"].at[3].set(1e5)
    return Model(params=params, config=TINY)


def test_values_that_float16_cannot_hold_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"final_layer_norm\.weight.*float16"):
        pj.save_hf(too_large(), tmp_path / "out", dtype="float16")
    assert not os.listdir(tmp_path)
    pj.save_hf(too_large(), tmp_path / "out", dtype="bfloat16")


def test_suite_model_exports_the_shape_of_its_config(tmp_path):
    config = ModelConfig.from_size("14m", num_hidden_layers=1, vocab_size=256)
    pj.save_hf(our_model(config), tmp_path / "out", dtype="float16")
    loaded = pj.load(tmp_path / "out")
    assert loaded.config == config
    assert loaded.stored_dtype == "float16"


# The published form.

PUBLISHED = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 512,
    "initializer_range": 0.02,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
"""config.json of EleutherAI/pythia-70m, but for the release of transformers that wrote it."""


def test_published_form_is_the_hubs_config_and_float16(tmp_path, caplog):
    config = ModelConfig.from_size("70m")
    opened = replace(
        from_model(our_model()),
        config=config,
        read=lambda parameter, layer: np.zeros(
            parameter.shape(config)[int(parameter.stacked) :], np.float32
        ),
    )
    hf_out.save(opened, tmp_path / "out", as_pythia=True)
    raw = (tmp_path / "out" / "config.json").read_text()
    assert json.loads(raw) == PUBLISHED
    assert '"rotary_emb_base": 10000,' in raw
    assert "not quite the function that was trained" in caplog.text
    assert {kind for kind, _, _ in stored(tmp_path / "out").values()} == {"torch.float16"}


def test_published_form_in_another_dtype_and_of_an_exact_gelu_needs_no_warning(tmp_path, caplog):
    pj.save_hf(our_model(), tmp_path / "out", as_pythia=True, dtype="float32")
    assert "GELU" not in caplog.text
    model, tokens = our_model(), random_tokens(TINY, 2, 30)
    reference = load_theirs(tmp_path / "out").eval()
    assert np.abs(our_logits(model, tokens) - hf_logits(reference, tokens)).max() <= 2e-5


# Half-precision angles.


def sharpened(model):
    """With attention that depends on where things stand, as a trained model's does."""
    projection = model.params["layers"]["attention"]["query_key_value"]
    projection["kernel"] = 20 * projection["kernel"]
    return model


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_angles_warn_and_the_card_has_the_difference_of_the_whole_model(
    precision, tmp_path, caplog
):
    config = replace(TINY, rotary_pct=1.0, rotary_precision=precision)
    model = sharpened(our_model(config))
    with caplog.at_level(logging.WARNING, logger="pythia_jax"):
        pj.save_hf(model, tmp_path / "out")
    served = pj.load(tmp_path / "out")
    assert served.config == replace(config, rotary_precision="float32")
    # TINY has 64 positions, so what was measured is the whole of its context.
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 64)).astype(np.int32)
    trained, exported = our_logits(model, tokens), our_logits(served, tokens)
    p, q = (torch.tensor(x).log_softmax(-1) for x in (trained, exported))
    found = angles.measure(from_model(model))
    assert found is not None and (found.rows, found.first, found.last) == (2, 0, 63)
    assert found.largest_logit == pytest.approx(np.abs(trained - exported).max(), rel=1e-3)
    assert found.largest_logit > 1e-3 and found.kl > 1e-7
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum") / tokens.size
    assert found.kl == pytest.approx(float(kl), rel=1e-2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert found.in_words() in card and found.in_words() in caplog.text


def test_angles_are_measured_at_the_end_of_the_context():
    far = replace(TINY, max_position_embeddings=2048, rotary_pct=1.0, rotary_precision="float16")
    model = sharpened(our_model(far))
    found = angles.measure(from_model(model))
    assert found is not None and (found.first, found.last) == (1792, 2047)
    near = angles.measure(
        from_model(replace(model, config=replace(far, max_position_embeddings=256)))
    )
    assert near is not None and found.kl > 3 * near.kl


def test_float32_angles_are_not_measured():
    def never(parameter, layer):
        raise AssertionError("nothing needs to be read")

    assert angles.measure(replace(from_model(our_model()), read=never)) is None
