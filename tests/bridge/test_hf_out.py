"""Hugging Face folders out: the same function in transformers; nothing lost or half-written."""

import json
import os
import re
import weakref
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_folders import load_theirs, our_logits, our_model, stored
from reference import TINY, hf_logits, random_params, random_tokens

import pythia_jax as pj
from pythia_jax.bridge import Model, hf
from pythia_jax.configs import ModelConfig

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
