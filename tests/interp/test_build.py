"""Building an index: true gradients, the same bytes after a stop, refusals that leave nothing."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import index_cases
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from index_cases import START, STOP
from peers import remake
from reference import distance

import pythia_jax as pj
from launch.local_pod import run_pod
from pythia_jax import configs
from pythia_jax.data import batches
from pythia_jax.interp import index as files
from pythia_jax.interp import index_writer, preflight
from pythia_jax.interp.build import build_index, build_index_of
from pythia_jax.interp.index import open_index
from pythia_jax.interp.projection import Projection, rademacher
from pythia_jax.interp.result_folder import alone
from pythia_jax.model.parameters import items, map_parameters

CLOSE = 1e-5


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return index_cases.packed(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def index(config, tmp_path_factory):
    return index_cases.build(config, tmp_path_factory.mktemp("built") / "index")


@pytest.fixture(scope="module")
def by_document(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "index"
    return index_cases.build(config, out, unit="document", precision="bfloat16")


@jax.jit
def gradient_of_losses(params, tokens, counted):
    return jax.grad(lambda p: (pj.token_losses(p, tokens, index_cases.CONFIG)[0] * counted).sum())(
        params
    )


def true_gradients(config, row) -> dict[str, np.ndarray]:
    """Of one row's losses, by `jax.grad`: name in torch → [out, in]."""
    tokens = batches(config)[int(row["step"])][None, row["slot"]]
    counted = np.arange(1, tokens.shape[1])
    counted = (counted >= row["start"]) & (counted < row["stop"])
    model = index_cases.model()
    gradient = gradient_of_losses(model.params, tokens, counted)
    return {
        p.hf.format(layer=layer).removeprefix("gpt_neox.").removesuffix(".weight"): np.asarray(
            value[layer]
        ).T
        for p, value in items(gradient)
        if p.path.startswith("layers/") and p.path.endswith("/kernel")
        for layer in range(model.config.num_hidden_layers)
    }


def projected(name: str, gradient: np.ndarray) -> np.ndarray:
    left, right = (
        rademacher(f"{name}/{side}", Projection(16), width)
        for side, width in zip(("left", "right"), gradient.shape, strict=True)
    )
    return left @ gradient @ right.T


def test_rows_of_sequences_are_their_true_gradients_projected(config, index):
    for number in (0, 7, 11):
        for name, gradient in true_gradients(config, index.rows[number]).items():
            assert distance(index.by_module(name)[number], projected(name, gradient)) < CLOSE


def test_rows_of_documents_are_the_gradients_of_their_losses(config, by_document):
    assert by_document.gradients.dtype == ml_dtypes.bfloat16
    for number in (0, 5, len(by_document) - 1):
        for name, gradient in true_gradients(config, by_document.rows[number]).items():
            found = by_document.by_module(name)[number].astype(np.float32)
            assert distance(found, projected(name, gradient)) < 4e-3  # of bfloat16


def test_the_documents_of_a_sequence_sum_up_to_it(index, by_document):
    for number, row in enumerate(index.rows):
        own = (by_document.rows["step"] == row["step"]) & (by_document.rows["slot"] == row["slot"])
        total = np.asarray(by_document.gradients[own], np.float32).sum(axis=0)
        assert distance(total, index.gradients[number]) < 4e-3


def test_numbers_are_bergsons(tmp_path):
    theirs = np.load(Path(remake.__file__).with_name("bergson.npz"))
    rows = index_cases.golden_rows(tmp_path)
    for name, projection in (("projected", Projection(16)), ("raw", None)):
        out = tmp_path / name
        built = build_index(
            index_cases.model(), rows, 0, 1, out, projection=projection, show_progress=False
        )
        for ours, expected in zip(built.gradients, theirs[name], strict=False):
            assert distance(ours, expected) < CLOSE
        info = json.loads(str(theirs[f"{name}.info.json"]))
        info |= {"num_items": 4, "num_grads": 4}
        assert (out / "info.json").read_text() == json.dumps(info, indent=2)
        processor = str(theirs[f"{name}.processor_config.yaml"])
        assert (out / "processor_config.yaml").read_text() == processor


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


KILLED = """
import os, signal, sys
from pathlib import Path
import index_cases
from pythia_jax import configs
from pythia_jax.interp.index_writer import IndexWriter

write = IndexWriter._record

def killed(self, done):
    if done == 2:  # its rows are written, and nothing says so
        with (self.folder / "gradients.bin").open("r+b") as file:
            file.seek(11 * self._row_bytes // 2)
            file.write(b"cut off in the middle")
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, done)

IndexWriter._record = killed
index_cases.build(configs.load(sys.argv[1]), Path(sys.argv[2]))
"""


def environment(**more: str) -> dict[str, str]:
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here, here.parent, here.parents[1])))
    return {**os.environ, "PYTHONPATH": path, **more}


def test_a_killed_build_goes_on_to_the_same_bytes(config, index, tmp_path, caplog):
    path = tmp_path / "run.yaml"
    configs.save(config, path)
    out = tmp_path / index.folder.name
    command = [sys.executable, "-c", KILLED, str(path), str(out)]
    done = subprocess.run(command, env=environment(), check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    building = files.unfinished(out)
    assert json.loads((building / "progress-0.json").read_text()) == {"chunks": 1}
    # Of how many rows together it was begun with, nobody need know.
    index_cases.build(config, out, batch=None)
    differing = {"config.yaml"}  # which names its folder
    found, straight = contents(out), contents(index.folder)
    assert found.keys() == straight.keys()
    assert {name for name in found if found[name] != straight[name]} <= differing
    assert not building.exists()


def test_an_error_while_writing_ends_the_build_and_is_no_progress(config, tmp_path, monkeypatch):
    record = index_writer.IndexWriter._record

    def full(self, done):
        if done == 2:
            raise OSError("no space left")
        record(self, done)

    monkeypatch.setattr(index_writer.IndexWriter, "_record", full)
    with pytest.raises(OSError, match="no space left"):
        index_cases.build(config, tmp_path / "index")
    told = (tmp_path / "index.building" / "progress-0.json").read_text()
    assert json.loads(told) == {"chunks": 1}


def test_a_finished_index_is_not_built_again(config, index, caplog):
    before = contents(index.folder)
    with caplog.at_level("INFO"):
        index_cases.build(config, index.folder, batch=None)
    assert "finished already" in caplog.text
    assert contents(index.folder) == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"precision": "float16"}, "precision was 'float32', is 'float16'"),
        ({"projection": Projection(4)}, "projection.dimension was 16, is 4"),
        ({"projection": None}, "projection was {.*}, is None"),
        ({"unit": "document"}, "unit was 'sequence', is 'document'"),
        ({"rows": 3}, "sample was None, is 3"),
    ],
)
def test_another_index_in_the_same_folder_is_refused(config, index, changes, told):
    with pytest.raises(FileExistsError, match=f"another gradient index: {told}"):
        index_cases.build(config, index.folder, **changes)


def test_other_weights_and_other_rows_are_refused_in_the_same_folder(config, index, tmp_path):
    model = index_cases.model()
    other = dataclasses.replace(model, params=jax.tree.map(lambda x: x * 1.5, model.params))
    with pytest.raises(FileExistsError, match="weights was"):
        index_cases.build(config, index.folder, model=other)
    shuffled = index_cases.run(config.data.train[0], {"seed": 7})
    with pytest.raises(FileExistsError, match="rows was"):
        index_cases.build(shuffled, index.folder)


def test_a_folder_of_something_else_is_refused(config, tmp_path):
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(FileExistsError, match="no gradient index"):
        index_cases.build(config, tmp_path)
    assert contents(tmp_path) == {"thesis.tex": "…".encode()}


def test_another_number_of_rows_together_is_refused_on_the_way(config, index, tmp_path):
    out = tmp_path / "index"
    shutil.copytree(index.folder, files.unfinished(out))
    with pytest.raises(FileExistsError, match="begun with 4 rows together"):
        index_cases.build(config, out, batch=2)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"unit": "token"}, "unit 'token': choose sequence or document"),
        ({"precision": "int8"}, "precision 'int8': choose from float32, bfloat16, float16"),
        ({"rows": 0}, "rows 0"),
        ({"batch": 0}, "0 rows together"),
    ],
)
def test_bad_arguments_are_refused_and_leave_nothing(config, tmp_path, how, message):
    with pytest.raises(ValueError, match=message):
        index_cases.build(config, tmp_path / "index", **how)
    assert not list(tmp_path.iterdir())


def test_steps_and_models_that_do_not_fit_the_run_are_refused(config, tmp_path):
    with pytest.raises(ValueError, match="steps 5:9"):
        build_index(index_cases.model(), config, 5, 9, tmp_path / "index")
    small = dataclasses.replace(index_cases.CONFIG, max_position_embeddings=16)
    model = dataclasses.replace(index_cases.model(), config=small)
    with pytest.raises(ValueError, match="the model has 16 positions"):
        build_index(model, config, 0, 2, tmp_path / "index")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        index_cases.build(config, tmp_path / "nowhere" / "index")


def test_two_builds_of_one_index_at_a_time_are_refused(config, tmp_path):
    with (
        alone(tmp_path / "index"),
        pytest.raises(RuntimeError, match="another process is writing there"),
    ):
        index_cases.build(config, tmp_path / "index")
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_the_disk_is_refused_with_numbers(config, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 90_000, 90_000)  # type: ignore[attr-defined]
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"12 rows takes 98\.8 kB of disk, and 90 kB are free"):
        index_cases.build(config, tmp_path / "index")
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_memory_is_made_smaller_or_refused(config, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "host_memory", lambda: 1000)
    with pytest.raises(MemoryError, match=r"4 rows at a time.* and 1 kB are free"):
        index_cases.build(config, tmp_path / "index")
    with pytest.raises(MemoryError, match="1 rows at a time"):
        index_cases.build(config, tmp_path / "index", batch=None, rows=2)
    assert not list(tmp_path.iterdir())


def test_a_gradient_that_is_no_number_names_its_row_and_module(config, tmp_path):
    # One token of one slot of step 4 becomes NaN, and everything after it in its row.
    model = index_cases.model()
    served = batches(config)
    seen = np.bincount(
        np.concatenate([served[s].ravel() for s in range(START, STOP)]), minlength=256
    )
    places = [(slot, t) for slot, row in enumerate(served[4]) for t in row[:-1] if seen[t] == 1]
    slot, token = places[0]
    embedding = model.params["embed_in"]["embedding"].at[token].set(jnp.nan)
    params = {**model.params, "embed_in": {"embedding": embedding}}
    bad = dataclasses.replace(model, params=params)
    where = rf"step 4, slot {slot}, .*, in layers\.0\.attention\.query_key_value and 7 more, is no"
    with pytest.raises(ValueError, match=where):
        index_cases.build(config, tmp_path / "index", model=bad)
    told = (tmp_path / "index.building" / "progress-0.json").read_text()
    assert json.loads(told) == {"chunks": 2}


@pytest.mark.parametrize(
    ("scaled", "factor", "message"),
    [
        # Of each layer one module alone.
        ("layers/mlp/dense_4h_to_h/kernel", 1e-10, r"h_to_4h and 1 more, is all zeros in"),
        ("embed_out/kernel", 1e7, r"query_key_value and \d more, is too large for"),
    ],
)
def test_a_gradient_that_float16_cannot_hold_names_its_row_and_module(
    config, tmp_path, scaled, factor, message
):
    def changed(parameter, value):
        return value * factor if parameter.path == scaled else value

    model = index_cases.model()
    small = dataclasses.replace(model, params=map_parameters(changed, model.params))
    with pytest.raises(ValueError, match=f"step 2, slot 0, .*, in .*{message} float16"):
        index_cases.build(config, tmp_path / "index", model=small, precision="float16", batch=1)


COMMAND = "from pythia_jax.cli.gradients import gradients; gradients()"


@pytest.mark.slow
@pytest.mark.parametrize(("unit", "fsdp"), [("sequence", 1), ("document", 2)])
def test_two_processes_of_two_devices_write_the_index_of_one(config, tmp_path, unit, fsdp):
    path = tmp_path / "run.yaml"
    configs.save(config, path)
    pj.save_hf(index_cases.model(), tmp_path / "hf")
    out = tmp_path / "two"
    arguments = ["build", str(tmp_path / "hf"), "--data", str(path), "--steps", f"{START}:{STOP}"]
    arguments += ["--out", str(out), "--unit", unit, "--batch", "4", "--pod", "--fsdp", str(fsdp)]
    heartbeat = ["--distributed.heartbeat-seconds", "10"]
    command = [sys.executable, "-c", COMMAND, *arguments, *heartbeat]
    result = run_pod(command, 2, devices_per_process=2, env=environment())
    assert result.status == 0, result.output
    alone = build_index_of(
        tmp_path / "hf", config, START, STOP, tmp_path / "one", unit=unit, show_progress=False
    )
    together = open_index(out)
    np.testing.assert_array_equal(together.rows, alone.rows)
    assert together.settings == alone.settings
    for ours, theirs in zip(together.gradients, alone.gradients, strict=True):
        assert distance(ours, theirs) < CLOSE
    assert not list(out.glob("progress-*"))
    assert together.provenance["computed"]["processes"] == 2
