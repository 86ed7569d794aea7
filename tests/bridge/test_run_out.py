"""Run folders out: what Orbax and we read back is what was given, and never half of it."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hf_folders import our_model
from reference import TINY

from pythia_jax import configs
from pythia_jax.bridge import run_in, run_out
from pythia_jax.bridge.opened import Opened, from_model
from pythia_jax.model.parameters import items
from pythia_jax.training.digests import digests
from pythia_jax.training.stored import read_about


def checkpoint(dtype: str = "float16", **fields) -> Opened:
    opened = from_model(our_model(stored_dtype=dtype))
    params = {p.path: np.asarray(a).astype(dtype) for p, a in items(our_model().params)}

    def read(parameter, layer):
        return params[parameter.path][layer] if parameter.stacked else params[parameter.path]

    return dataclasses.replace(opened, read=read, source="the test", **fields)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_orbax_reads_what_was_given_and_its_digests_are_those_of_whole_arrays(
    tmp_path: Path, dtype: str
) -> None:
    given = checkpoint(dtype)
    run_out.save(given, tmp_path / "run", step=3)
    path = tmp_path / "run" / "checkpoints" / "3"
    state = ocp.PyTreeCheckpointer().restore(path / "state")
    for parameter, array in items(state["params"]):
        want = np.stack([given.read(parameter, i) for i in given.layers(parameter)])
        want = want if parameter.stacked else want[0]
        assert np.asarray(array).dtype == want.dtype
        assert np.asarray(array).tobytes() == want.tobytes()
    assert read_about(path)["digests"] == digests(jax.tree.map(jnp.asarray, state))
    with ocp.CheckpointManager(tmp_path / "run" / "checkpoints") as manager:
        assert manager.all_steps() == [3]


def test_steps_of_one_model_go_beside_each_other_and_keep_what_is_known(tmp_path: Path) -> None:
    run = tmp_path / "run"
    tokenizer = {"special_tokens_map.json": b"{}\n"}
    facts = {"name": "pythia-x", "optimizer.betas": (0.9, 0.95)}
    run_out.save(checkpoint(step=8, facts=facts, tokenizer_files=tokenizer), run)
    run_out.save(checkpoint(), run)
    newest, first = run_in.open_folder(run), run_in.open_folder(run, 0)
    assert (newest.step, newest.stored_dtype, newest.tokenizer_files) == (8, "float16", tokenizer)
    assert newest.facts == {"name": "pythia-x", "optimizer.betas": [0.9, 0.95]}
    assert first.step is None, "of which step it is was not known"
    assert configs.load(run / "config.yaml").model == TINY
    source = read_about(run / "checkpoints" / "8")["converted"]
    assert source["source"] == "the test" and source["by"].startswith("pythia_jax ")


def test_a_step_that_is_there_and_other_folders_are_refused_and_stay(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_out.save(checkpoint(), run, step=2)
    before = {
        path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()
    }
    with pytest.raises(FileExistsError, match="holds step 2 already"):
        run_out.save(checkpoint(), run, step=2)
    other = dataclasses.replace(TINY, layer_norm_eps=1e-3)
    with pytest.raises(FileExistsError, match=r"steps of another model \(layer_norm_eps"):
        run_out.save(dataclasses.replace(checkpoint(), config=other), run, step=4)
    assert contents(run / "checkpoints") == before
    shutil.rmtree(run / "checkpoints")  # as a run that has trained, and saved nothing yet
    begun = run / "config.yaml"
    begun.write_text(begun.read_text().replace("name: run", "name: mine"))
    with pytest.raises(FileExistsError, match="something else than converted checkpoints"):
        run_out.save(checkpoint(), run)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="something else than converted checkpoints"):
        run_out.save(checkpoint(), tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("first", [True, False])
def test_a_conversion_that_fails_leaves_nothing_under_the_name_of_the_step(
    tmp_path: Path, first: bool
) -> None:
    run = tmp_path / "run"
    if not first:
        run_out.save(checkpoint(), run, step=1)
    given = checkpoint()

    def fail(parameter, layer):
        if parameter.path == "final_layer_norm/scale":
            raise OSError("the disk is gone")
        return given.read(parameter, layer)

    with pytest.raises(OSError, match="the disk is gone"):
        run_out.save(dataclasses.replace(given, read=fail), run, step=5)
    if first:
        assert not list(tmp_path.iterdir())
        return
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["1"]
    assert run_in.open_folder(run).step == 1
    run_out.save(given, run, step=5)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["1", "5"]


def test_what_float16_cannot_hold_is_an_error_that_names_it(tmp_path: Path) -> None:
    given = checkpoint("float32")

    def large(parameter, layer):
        return given.read(parameter, layer) + 1e6 * (parameter.path == "embed_out/kernel")

    with pytest.raises(ValueError, match=r"embed_out/kernel holds .* float16 cannot"):
        run_out.save(dataclasses.replace(given, read=large), tmp_path / "run", dtype="float16")
    with pytest.raises(ValueError, match="dtype 'int8' is not one of"):
        run_out.save(given, tmp_path / "run", dtype="int8")
    assert not list(tmp_path.iterdir())
