"""Pushing to the hub, against a server that speaks its interface."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from hf_folders import our_model
from hub_server import hub_server
from reference import TINY, random_params
from safetensors.numpy import load as load_tensors

import pythia_jax as pj
from pythia_jax import configs
from pythia_jax.bridge import hf_out, hub, push
from pythia_jax.bridge.model import Model
from pythia_jax.bridge.opened import from_model
from pythia_jax.configs import CheckpointConfig, DataConfig, RunConfig, TrainingConfig
from pythia_jax.sharding import make_mesh
from pythia_jax.training.checkpoints import Checkpoints
from pythia_jax.training.step import abstract_state
from pythia_jax.training.trainer import fresh_state

REPO = "someone/model"
MADE = {"README.md", "config.json", "generation_config.json", "model.safetensors"}


@pytest.fixture
def server(tmp_path, monkeypatch):
    with hub_server(tmp_path / "hub") as running:
        running.use(monkeypatch, tmp_path / "cache")
        monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
        (tmp_path / "temporary").mkdir()
        yield running


@pytest.fixture
def exported(tmp_path):
    pj.save_hf(our_model(), tmp_path / "exported")
    return tmp_path / "exported"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without_attributes(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name != ".gitattributes"}


def puts(server) -> int:
    return sum(request.method == "PUT" for request in server.requests)


def opened_at(step: int):
    model = Model(params=random_params(TINY, seed=step), config=TINY)
    return replace(from_model(model), step=step, facts={"name": "tiny", "training.batch_size": 4})


# One checkpoint.


@pytest.mark.parametrize("revision", [None, "step3"])
def test_folder_lies_on_the_hub_as_it_was_and_can_be_fetched(revision, server, exported):
    where = push.push(exported, REPO, revision=revision)
    assert where == f"{server.url}/{REPO}/tree/{revision or 'main'}"
    found = server.files(REPO, revision or "main")
    assert without_attributes(found) == contents(exported)
    assert len(server.log(REPO, revision or "main")) == 2
    fetched = hub.fetch(REPO, revision=revision)
    assert pj.load(fetched).config == TINY
    if revision is not None:
        assert set(server.files(REPO, "main")) == {".gitattributes"}


@pytest.mark.parametrize("private", [False, True])
def test_repository_is_as_private_as_asked(private, server, exported):
    push.push(exported, REPO, private=private)
    assert server.repos[REPO].private == private


def test_shards_of_an_older_push_go_and_other_files_stay(server, exported, tmp_path):
    pj.save_hf(our_model(), tmp_path / "shards", max_shard_size=100_000)
    push.push(tmp_path / "shards", REPO)
    head = server.repos[REPO]
    server.commit(
        head, "main", {**server.log(REPO)[0].files, "plot.png": server.put(b"plot")}, "a plot"
    )
    push.push(exported, REPO)
    assert set(server.files(REPO)) == MADE | {".gitattributes", "plot.png"}


@pytest.mark.parametrize("name", ["model", "a/b/c", "-a/b", "", "/b", "https://huggingface.co/a/b"])
def test_name_that_cannot_be_is_an_error_before_anything_is_asked(name, server, exported):
    with pytest.raises(ValueError, match="ORG/NAME"):
        push.push(exported, name)
    with pytest.raises(ValueError, match="ORG/NAME"):
        push.push_steps(opened_at, [0], name)
    assert not server.requests


def test_folder_without_a_model_is_an_error_before_anything_is_asked(server, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        push.push(tmp_path, REPO)
    assert not server.requests


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (401, PermissionError, "HF_TOKEN"),
        (403, PermissionError, "HF_TOKEN"),
        (400, ConnectionError, "400"),
    ],
)
def test_refusal_of_the_hub_says_what_to_do(status, kind, words, server, exported):
    server.fail_once("/api/repos/create", status)
    with pytest.raises(kind, match=words) as error:
        push.push(exported, REPO)
    assert REPO in str(error.value)


def test_offline_nothing_is_pushed(server, exported, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        push.push(exported, REPO)


# A run.


def test_every_step_has_its_branch_and_main_is_the_last(server, tmp_path):
    assert push.push_steps(opened_at, [4, 0, 1], REPO) == ["step0", "step1", "step4", "main"]
    assert set(server.branches(REPO)) == {"main", "step0", "step1", "step4"}
    for step in (0, 1, 4):
        hf_out.save(opened_at(step), tmp_path / str(step))
        assert without_attributes(server.files(REPO, f"step{step}")) == contents(
            tmp_path / str(step)
        )
    assert server.files(REPO, "main") == server.files(REPO, "step4")
    assert hub.revisions(REPO) == [0, 1, 4]
    # The weights of the last step were uploaded once.
    assert puts(server) == 3
    assert not list((tmp_path / "temporary").iterdir())


def test_options_of_the_export_are_passed_on(server):
    push.push_steps(opened_at, [1], REPO, dtype="float16", max_shard_size=100_000)
    found = server.files(REPO, "step1")
    shards = [content for name, content in found.items() if name.endswith(".safetensors")]
    assert len(shards) > 1
    assert all(x.dtype == np.float16 for shard in shards for x in load_tensors(shard).values())


def test_push_that_broke_off_goes_on_where_it_was(server, tmp_path, monkeypatch):
    real, asked = push._upload, []

    def failing(api, folder, *rest):
        asked.append([path.name for path in folder.parent.parent.iterdir()])
        if len(asked) == 3:
            raise OSError(5, "Input/output error")
        real(api, folder, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(push, "_upload", failing)
        with pytest.raises(OSError, match="Input/output"):
            push.push_steps(opened_at, [0, 1, 4], REPO)
    assert [len(exports) for exports in asked] == [1, 1, 1], "one export on disk at a time"
    assert not list((tmp_path / "temporary").iterdir())
    # What was not completed holds no weights, and not those of another step.
    assert "model.safetensors" not in server.files(REPO, "step4")
    uploaded = puts(server)
    assert push.push_steps(opened_at, [0, 1, 4], REPO) == ["step4", "main"]
    assert puts(server) == uploaded + 1
    assert push.push_steps(opened_at, [0, 1, 4], REPO) == []


def test_server_that_fails_in_the_middle_of_a_commit_leaves_the_branch_to_be_done(server):
    push.push_steps(opened_at, [0], REPO)
    server.fail_once("/commit/step1", 400)
    with pytest.raises(ConnectionError, match="goes on from there"):
        push.push_steps(opened_at, [0, 1], REPO)
    assert push.push_steps(opened_at, [0, 1], REPO) == ["step1", "main"]
    assert server.files(REPO, "main") == server.files(REPO, "step1")


def test_longer_run_adds_branches_and_moves_main(server):
    push.push_steps(opened_at, [0, 1], REPO)
    assert push.push_steps(opened_at, [0, 1, 4], REPO) == ["step4", "main"]
    assert server.files(REPO, "main") == server.files(REPO, "step4")


@pytest.mark.parametrize("change", ["weights", "dtype", "tokenizer", "facts"])
def test_branch_of_another_export_is_written_again(change, server):
    push.push_steps(opened_at, [0, 1], REPO)

    def other(step):
        opened = opened_at(step)
        if change == "weights":
            return replace(opened, read=opened_at(step + 100).read)
        if change == "tokenizer":
            return replace(opened, tokenizer_files={"special_tokens_map.json": b"{}"})
        if change == "facts":
            return replace(opened, facts={**opened.facts, "name": "another"})
        return opened

    dtype = "float16" if change == "dtype" else None
    before = server.files(REPO, "step0")
    assert push.push_steps(other, [0, 1], REPO, dtype=dtype) == ["step0", "step1", "main"]
    assert server.files(REPO, "step0") != before


def test_model_card_that_was_edited_on_the_hub_is_kept(server):
    push.push_steps(opened_at, [0], REPO)
    commit = server.log(REPO)[0]
    edited = {**commit.files, "README.md": server.put(b"# mine")}
    server.commit(server.repos[REPO], "main", edited, "Update README.md")
    assert push.push_steps(opened_at, [0], REPO) == []
    assert server.files(REPO)["README.md"] == b"# mine"


def test_no_steps_are_an_error(server):
    with pytest.raises(ValueError, match="no step"):
        push.push_steps(opened_at, [], REPO)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with scheduled steps 0 and 2, and step 3 only to resume from."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = RunConfig(
        name="a-run",
        model=TINY,
        data=DataConfig(sequence_length=32),
        training=TrainingConfig(steps=10, batch_size=4),
        checkpoint=CheckpointConfig(directory=str(folder), extra_steps=(0, 2)),
    )
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), Checkpoints(config, abstract_state(config, mesh)) as checkpoints:
        assert checkpoints.restore_newest() is None
        for step in (0, 2, 3):
            checkpoints.save(step, fresh_state(config, mesh), resume=step == 3)
    configs.save(config, folder / "config.yaml")
    return folder


def test_run_folder_goes_up_step_by_step_with_its_facts(server, run):
    assert push.push_run(run, REPO) == ["step0", "step2", "main"]
    assert set(server.branches(REPO)) == {"main", "step0", "step2"}
    card = server.files(REPO, "step2")["README.md"].decode()
    assert "# a-run" in card and f"| Tokens seen | {2 * 4 * 32} |" in card
    for step in (0, 2):
        ours, theirs = pj.load(run, step=step), pj.load(hub.fetch(REPO, revision=f"step{step}"))
        assert theirs.config == ours.config
        for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
            np.testing.assert_array_equal(a, b)
    assert push.push_run(run, REPO, revisions=[2, 3]) == ["step3", "main"]


def test_step_that_the_run_has_not_is_an_error_before_anything_is_asked(server, run):
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 1; there are 0, 2, 3"):
        push.push_run(run, REPO, revisions=[0, 1])
    with pytest.raises(FileNotFoundError, match="no run folder with checkpoints"):
        push.push_run(run / "nothing", REPO)
    assert not server.requests
