"""Dumps of activations: the model's own values, whole however often the writing was stopped."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from command_line import refused, run
from interp_runs import BATCH, SEQ, run_config
from reference import hf_model, random_params
from safetensors import safe_open

import pythia_jax as pj
from launch.local_pod import run_pod
from pythia_jax import configs, data
from pythia_jax.bridge.model import Model
from pythia_jax.cli import main
from pythia_jax.cli.activations import activations as command
from pythia_jax.configs import RunConfig
from pythia_jax.interp.dump import dump_activations, parse_sites
from pythia_jax.interp.dumped import open_dump
from pythia_jax.interp.result_folder import alone

if "activations" not in main.commands:
    main.add_command(command)

SITES = [("resid_post", (1, 0)), "mlp.post", "ln_final", "attn.pattern"]
NAMES = ["resid_post.1", "resid_post.0", "mlp.post.0", "mlp.post.1", "ln_final"]
NAMES += ["attn.pattern.0", "attn.pattern.1"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: Any) -> RunConfig:
    return run_config(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(config: RunConfig) -> Model:
    assert config.model is not None
    return Model(random_params(config.model), config.model, source="random", step=2)


def make(model: Model, config: RunConfig, out: Path, sites: Any = SITES, **how: Any) -> Any:
    how = {"start": 1, "stop": 4, "show_progress": False, **how}
    return dump_activations(model, config, how.pop("start"), how.pop("stop"), sites, out, **how)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_values_are_those_of_the_model_on_the_exact_rows(model, config, tmp_path) -> None:
    made = make(model, config, tmp_path / "dump", batch=BATCH)
    assert len(made) == 3 * BATCH and list(made.shapes) == NAMES
    assert made.keys["step"].tolist() == [s for s in (1, 2, 3) for _ in range(BATCH)]
    assert made.keys["slot"].tolist() == [*range(BATCH)] * 3
    assert made.positions.tolist() == list(range(SEQ))
    for step, part in zip((1, 2, 3), made, strict=True):
        tokens = data.batches(config)[step]
        np.testing.assert_array_equal(part.tokens, tokens)
        wanted = pj.interp.activations(model.params, tokens[:, :-1], model.config, SITES)
        for name, value in part.values.items():
            site, _, layer = name.rpartition(".")
            if name == "ln_final":
                expected = wanted[name]
            elif site == "resid_post":
                expected = wanted[site][(1, 0).index(int(layer))]
            else:
                expected = wanted[site][int(layer)]
            assert value.dtype == np.float32
            np.testing.assert_allclose(value, expected, atol=1e-6, rtol=0)


def test_residual_streams_are_hidden_states_of_transformers(model, config, tmp_path) -> None:
    made = make(model, config, tmp_path / "dump", sites=["resid_pre", "resid_post"])
    reference = hf_model(model.params, model.config)
    tokens = torch.tensor(made.read("tokens")[:, :-1].astype(np.int64))
    with torch.no_grad():
        states = reference(tokens, output_hidden_states=True).hidden_states
    assert len(states) == 3  # the last one is behind the final norm
    for name, place in (("resid_pre.0", 0), ("resid_post.0", 1), ("resid_pre.1", 1)):
        np.testing.assert_allclose(made.read(name), states[place].numpy(), atol=2e-5)


def test_chosen_positions_and_a_sample_of_rows(model, config, tmp_path) -> None:
    whole = make(model, config, tmp_path / "whole")
    some = make(model, config, tmp_path / "some", positions=[7, 2], rows=5)
    assert some.keys.tolist() == [(1, 0), (1, 2), (2, 0), (2, 3), (3, 1)]
    assert some.positions.tolist() == [7, 2]
    for key in some.keys.tolist():
        ours, theirs = some.row(*key), whole.row(*key)
        np.testing.assert_array_equal(ours["tokens"], theirs["tokens"])
        np.testing.assert_allclose(ours["ln_final"], theirs["ln_final"][[7, 2]], atol=1e-6)
        # Of two axes of positions, that of the query.
        pattern = theirs["attn.pattern.1"][:, [7, 2]]
        np.testing.assert_allclose(ours["attn.pattern.1"], pattern, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_numbers_are_the_wide_ones_rounded_and_any_reader_opens_them(
    model, config, tmp_path, dtype
) -> None:
    wide = make(model, config, tmp_path / "wide", sites=["resid_post"])
    narrow = make(model, config, tmp_path / "narrow", sites=["resid_post"], dtype=dtype)
    kind = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    expected = wide.read("resid_post.1").astype(kind)
    assert narrow.read("resid_post.1").dtype == kind
    np.testing.assert_array_equal(narrow.read("resid_post.1"), expected)
    path = tmp_path / "narrow" / "step-000002-rows-0-4.safetensors"
    with safe_open(path, framework="pt") as file:
        tensor = file.get_tensor("resid_post.1")
        assert str(tensor.dtype) == f"torch.{dtype}"
        np.testing.assert_array_equal(
            tensor.float().numpy(), expected[BATCH : 2 * BATCH].astype(np.float32)
        )
        assert file.metadata()["step"] == "2"
        assert file.get_tensor("slots").tolist() == list(range(BATCH))


def test_a_dump_that_was_stopped_goes_on_to_the_same_bytes(
    model, config, tmp_path, monkeypatch
) -> None:
    out = tmp_path / "dump"
    make(model, config, tmp_path / "once", batch=2)
    # As a kill leaves it: one file there, one that a bad disk cut off, one half-written.
    written = pj.interp.dump_activations.__globals__["Work"]._write
    calls = []

    def dies(self: Any, file: Any, gathered: Any) -> None:
        calls.append(file.name)
        if len(calls) == 3:
            raise OSError("the disk is gone")
        written(self, file, gathered)

    monkeypatch.setattr("pythia_jax.interp.dump_work.Work._write", dies)
    with pytest.raises(OSError, match="the disk is gone"):
        make(model, config, out, batch=2)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="this dump is not finished"):
        open_dump(out)
    first, second = (out / name for name in calls[:2])
    second.write_bytes(second.read_bytes()[:-5])
    (out / f".{calls[2]}.12.partial").write_bytes(b"half")
    (out / "run.yaml").unlink()  # it comes after the provenance
    left_alone = first.stat().st_mtime_ns
    make(model, config, out)  # the rows together are those it was begun with
    assert contents(out) == contents(tmp_path / "once")
    assert first.stat().st_mtime_ns == left_alone
    make(model, config, out)
    assert first.stat().st_mtime_ns == left_alone


def test_what_cannot_be_stored_is_named(model, config, tmp_path) -> None:
    params = jax.tree.map(jnp.array, model.params)
    tokens = data.batches(config)[1]
    rare = next(t for t in tokens[1] if t not in tokens[0])
    row = int(np.argmax((tokens == rare).any(axis=1)))
    embedding = params["embed_in"]["embedding"]
    for value, told in (
        (1e5, "is beyond what float16 can hold: store bfloat16 or float32"),
        (np.nan, "is no finite number"),
    ):
        params["embed_in"]["embedding"] = embedding.at[rare].set(value)
        broken = dataclasses.replace(model, params=params)
        with pytest.raises(ValueError) as error:
            make(broken, config, tmp_path / f"{value}", sites=["embed"], dtype="float16")
        assert str(error.value) == f"step 1, slot {row}: a value at embed {told}"
    params["embed_in"]["embedding"] = embedding.at[rare].set(1e5)
    broken = dataclasses.replace(model, params=params)
    made = make(broken, config, tmp_path / "wide", sites=["embed"], dtype="bfloat16")
    assert made.read("embed").max() > 9e4


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"dtype": "float16"}, "dtype was 'float32', is 'float16'"),
        ({"stop": 3}, r"rows was .*; steps was \[1, 4\], is \[1, 3\]"),
        ({"sites": ["embed"]}, "sites was .* is .*embed"),
        ({"rows": 2}, "sample was None, is 2"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_another_dump_in_the_same_folder_is_refused(
    model, config, tmp_path_factory, how, message
) -> None:
    out = tmp_path_factory.getbasetemp() / "one-dump"
    make(model, config, out, sites=["ln_final"])
    before = contents(out)
    with pytest.raises(FileExistsError, match=message):
        make(model, config, out, **{"sites": ["ln_final"], **how})
    other = dataclasses.replace(model, params=random_params(model.config, seed=1))
    with pytest.raises(FileExistsError, match="weights was"):
        make(other, config, out, sites=["ln_final"])
    assert contents(out) == before


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"sites": ["resid_mid"]}, "no site 'resid_mid'"),
        ({"sites": [("resid_post", (2,))]}, "choose from 0 to 1"),
        ({"start": 3, "stop": 3}, r"steps 3:3 \(half-open\) are not steps"),
        ({"stop": 9}, "which has 8, from 0 on"),
        ({"positions": [SEQ]}, f"from 0 to {SEQ - 1}, each once"),
        ({"positions": [1, 1]}, "each once"),
        ({"dtype": "float64"}, "dtype 'float64': choose from"),
        ({"rows": 0}, "rows 0: must be at least 1"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    model, config, tmp_path, how, message
) -> None:
    with pytest.raises(ValueError, match=message):
        make(model, config, tmp_path / "dump", **how)
    assert not (tmp_path / "dump").exists()


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    model, config, tmp_path, monkeypatch
) -> None:
    free = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    with pytest.raises(OSError, match=r"a dump of 12 rows takes .* kB of disk, and 1 kB are free"):
        make(model, config, tmp_path / "dump")
    assert not (tmp_path / "dump").exists()


def test_a_folder_of_something_else_is_left_alone(model, config, tmp_path) -> None:
    (tmp_path / "dump").mkdir()
    (tmp_path / "dump" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="there already, and no dump"):
        make(model, config, tmp_path / "dump")
    with pytest.raises(FileNotFoundError, match="holds no dump"):
        open_dump(tmp_path / "dump")
    with alone(tmp_path / "new"), pytest.raises(RuntimeError, match="another process is writing"):
        make(model, config, tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        make(model, config, tmp_path / "nowhere" / "dump")
    assert [path.name for path in tmp_path.rglob("*")] == ["dump", "thesis.tex"]


def test_rows_are_read_in_any_order_and_damage_is_told(model, config, tmp_path) -> None:
    made = make(model, config, tmp_path / "dump", sites=["ln_final"])
    everything = made.read("ln_final")
    chosen = [9, 0, 5, 5]
    np.testing.assert_array_equal(made.read("ln_final", chosen), everything[chosen])
    np.testing.assert_array_equal(made.read("ln_final", slice(3, 6)), everything[3:6])
    assert made.read("ln_final", []).shape == (0, SEQ, 32)
    assert made.number(2, 1) == BATCH + 1
    with pytest.raises(KeyError, match="no row of step 0, slot 1"):
        made.number(0, 1)
    with pytest.raises(ValueError, match=r"no 'resid_post.0'; there are ln_final, tokens"):
        made.read("resid_post.0")
    path = tmp_path / "dump" / "step-000002-rows-0-4.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="bytes, and"):
        made.read("ln_final")
    path.unlink()
    with pytest.raises(ValueError, match="is gone"):
        made.read("ln_final")


def test_sites_as_they_are_typed() -> None:
    text = "resid_post:3,mlp.post:1-2,ln_final,resid_post:0,attn_out:2,attn_out"
    assert parse_sites(text) == [
        ("resid_post", (3, 0)),
        ("mlp.post", (1, 2)),
        "ln_final",
        "attn_out",
    ]
    for wrong in ("resid_post:", "a:2-1", "", "a,,b", "a:x"):
        with pytest.raises(ValueError, match="a site, with layers if not all"):
            parse_sites(wrong)


def test_the_command_dumps_a_model_of_a_folder(model, config, tmp_path) -> None:
    pj.save_hf(model, tmp_path / "hf")
    configs.save(config, tmp_path / "run.yaml")
    out = tmp_path / "out"
    command = ["activations", "dump", tmp_path / "hf", "--data", tmp_path / "run.yaml"]
    command += ["--sites", "resid_post:1", "--out", out, "--positions", "0,2:4"]
    result = run(*command, "--steps", "0:2", "--step", 2)
    assert result.exit_code == 0, result.output
    assert f"{out}: 8 rows, 3 positions each, of resid_post.1" in result.output
    made = open_dump(out)
    assert made.positions.tolist() == [0, 2, 3] and made.provenance["settings"]["step"] == 2
    tokens = made.read("tokens")[:, :-1]
    wanted = pj.interp.activations(model.params, tokens, model.config, ["resid_post"])
    found = made.read("resid_post.1")
    np.testing.assert_allclose(found, wanted["resid_post"][1][:, [0, 2, 3]], atol=1e-5)
    assert json.loads((out / "provenance.json").read_text())["computed"]["run"] == "run"
    assert "--positions" in refused(*command[:-1], "x:y", "--steps", "0:2")


@pytest.mark.slow
def test_two_processes_write_the_dump_of_one(model, config, tmp_path) -> None:
    pj.save_hf(model, tmp_path / "hf")
    configs.save(config, tmp_path / "run.yaml")
    # The command as it is when it is not registered yet, too.
    code = "import sys; from pythia_jax.cli.activations import activations; activations()"
    arguments = ["dump", tmp_path / "hf", "--data", tmp_path / "run.yaml", "--steps", "0:3"]
    arguments += ["--sites", "resid_post,ln_final", "--batch", "2", "--step", "2"]
    alone = run("activations", *arguments, "--out", tmp_path / "one")
    assert alone.exit_code == 0, alone.output
    command = [sys.executable, "-c", code, *map(str, arguments), "--out", str(tmp_path / "two")]
    ran = run_pod([*command, "--pod"], 2, devices_per_process=2)
    assert ran.status == 0, ran.output
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.keys() == two.keys() and one["index.json"] == two["index.json"]
    for name in ("tokens", "ln_final", "resid_post.0"):
        ours, theirs = (open_dump(tmp_path / folder).read(name) for folder in ("one", "two"))
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
