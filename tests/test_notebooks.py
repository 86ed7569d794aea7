"""The notebooks, from top to bottom, on a small folder as `make quickstart` leaves it."""

import base64
import io
import json
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from pythia_jax import quickstart
from pythia_jax.configs import RunConfig

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PUBLISHED = ROOT / "../shared/data/published_evals"
TIMEOUT = 600
"""Seconds for a cell, on a busy machine."""


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a short quickstart leaves."""
    real = quickstart._config

    def config(out: Path) -> RunConfig:
        made = real(out)
        assert made.model is not None
        return replace(
            made,
            model=replace(made.model, num_hidden_layers=2),
            training=replace(made.training, steps=60, batch_size=4),
            checkpoint=replace(made.checkpoint, every=30),
            evaluation=replace(made.evaluation, every=30),
        )

    out = tmp_path_factory.mktemp("notebooks") / "quickstart"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "_config", config)
        patch.setattr(quickstart, "MAX_CHARACTERS", 600_000)
        quickstart.quickstart(out, say=lambda _: None, show_progress=False)
    return out


@dataclass
class Executed:
    """What a notebook printed and drew, and the folder that it wrote into."""

    text: str
    pictures: list[np.ndarray]
    out: Path | None

    def numbers(self, pattern: str) -> list[tuple[float, ...]]:
        """The groups of every match, as numbers; there is at least one match."""
        found = re.findall(pattern, self.text)
        assert found, f"{pattern!r} is not in {self.text}"
        return [tuple(map(float, (m,) if isinstance(m, str) else m)) for m in found]


def execute(name: str, quick: Path, tmp_path: Path, **variables: str) -> Executed:
    """Run a notebook in an empty folder; every file that it makes is below `tmp_path`."""
    made, working = tmp_path / "made", tmp_path / "working"
    made.mkdir()
    working.mkdir()
    before = files_below(quick)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables |= {
        "PYTHIA_JAX_QUICKSTART": str(quick),
        "PYTHONPATH": os.pathsep.join(paths),
        "TMPDIR": str(made),
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=TIMEOUT,
        startup_timeout=TIMEOUT,
        km=kernel(),
        resources={"metadata": {"path": str(working)}},
    )
    with pytest.MonkeyPatch.context() as patch:
        for key, value in variables.items():
            patch.setenv(key, value)
        client.execute()
    assert files_below(quick) == before and not list(working.iterdir())
    folders = list(made.glob(f"{name.replace('_', '-')}-*"))
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return Executed(
        "".join(o["text"] for o in outputs if o.get("name") == "stdout"),
        [picture(o["data"]["image/png"]) for o in outputs if "image/png" in o.get("data", {})],
        folders[0] if folders else None,
    )


def kernel() -> Any:
    """A kernel of this very Python, whatever kernels the machine has."""
    manager = pytest.importorskip("jupyter_client").AsyncKernelManager()
    spec = pytest.importorskip("ipykernel.kernelspec")
    manager._kernel_spec = manager.kernel_spec_manager.kernel_spec_class(
        argv=spec.make_ipkernel_cmd(executable=sys.executable), display_name="tests"
    )
    return manager


def files_below(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def picture(png: str) -> np.ndarray:
    """Pixels of a picture, which shows something: it has more than a few colours."""
    pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(png)), format="png")
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 20
    return pixels


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, cell.source
        assert not cell.metadata, cell.source
    assert notebook.cells[0].cell_type == "markdown"


def test_every_notebook_is_executed_by_a_test() -> None:
    executed = set(re.findall(r'execute\("(\w+)"', Path(__file__).read_text()))
    assert executed == {path.stem for path in NOTEBOOKS}


def test_a_batch_made_again_has_the_loss_that_the_run_logged(quick: Path, tmp_path: Path) -> None:
    ran = execute("reproduce_a_training_batch", quick, tmp_path)
    ((logged,),) = ran.numbers(r"logged by the run +(\S+)")
    ((again,),) = ran.numbers(r"of these rows +(\S+)")
    ((other,),) = ran.numbers(r"of the rows before +(\S+)")
    assert abs(again - logged) < 2e-5 < 1e-3 < abs(other - logged)
    ((steps, step, rows, width),) = ran.numbers(
        r"(\d+) steps; step (\d+) is int32 \((\d+), (\d+)\)"
    )
    assert (steps, step, rows, width) == (60, 30, 4, 257)
    (seen,) = re.findall(r"of steps \[(.*)\]", ran.text)
    assert str(30) in seen.split(", ")
    assert ran.out is None


@pytest.mark.slow
def test_the_curve_of_learning_dynamics_rises_above_chance(quick: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    published = PUBLISHED / "pythia-70m-deduped" / "zero-shot"
    given = {"PYTHIA_JAX_PUBLISHED": str(published)} if published.is_dir() else {}
    ran = execute("learning_dynamics", quick, tmp_path, **given)
    curve = {int(s): value for s, value, _ in ran.numbers(r"step +(\d+) +(\S+) ± (\S+)")}
    assert sorted(curve) == [0, 1, 2, 4, 8, 16, 30, 32, 60]
    assert 0.1 < curve[0] < 0.4 < curve[60], "chance is a quarter"
    assert curve[0] == curve[1], "the first update has learning rate 0"
    assert ran.out is not None
    written = json.loads(next(ran.out.glob("results/*/zero-shot/*_step60.json")).read_text())
    assert written["results"]["next_line"]["acc"] == pytest.approx(curve[60])
    (drawn,) = ran.pictures
    panels = 3 if given else 2
    assert drawn.shape[1] > 900 * min(panels, 2)


@pytest.mark.slow
def test_what_is_repeated_is_memorised_and_unseen_rows_are_not(quick: Path, tmp_path: Path) -> None:
    ran = execute("memorization", quick, tmp_path)
    found = {
        int(n): (s, m) for n, s, m in ran.numbers(r"(\d+) copies +score (\S+) +memorised (\S+)")
    }
    assert sorted(found) == [0, 1, 2, 4, 8, 16, 32, 64]
    assert found[64][1] > 0.5 and found[0][1] < 0.03 and found[1][1] < 0.03
    assert found[64][0] > found[16][0] > found[0][0]
    assert ran.out is not None
    lines = (ran.out / "scores.csv").read_text().splitlines()
    whole = sum(line.endswith(",1.0") for line in lines)
    assert ran.numbers(r"memorised: (\d+) of (\d+) rows") == [(whole, len(lines))]
    ((dispersion,),) = ran.numbers(r"variance / mean (\S+) ")
    assert 0.5 < dispersion < 1.6
    assert len(ran.pictures) == 2


@pytest.mark.slow
def test_the_intervention_turns_he_into_she(quick: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    ran = execute("gender_intervention", quick, tmp_path)
    assert ran.numbers(r"step (\d+): (\d+) of (\d+) rows differ") == [(29, 0, 8), (30, 8, 8)]
    rows = re.findall(r"(base|intervention) +step +(\d+) +he (\S+) +she (\S+)", ran.text)
    said = {(run, int(step)): (float(he), float(she)) for run, step, he, she in rows}
    assert said["base", 30] == said["intervention", 30]
    assert said["base", 60][0] > 0.5 > said["base", 60][1]
    assert said["intervention", 60][1] > 0.9 and said["intervention", 60][0] < 0.1
    assert len(ran.pictures) == 1


@pytest.mark.slow
def test_sums_of_common_numbers_are_learnt_first(quick: Path, tmp_path: Path) -> None:
    ran = execute("term_frequency", quick, tmp_path)
    half, whole = ran.numbers(r"step (\d+) +accuracy (\S+) +gap (\S+)")
    assert whole[1] > half[1]
    assert whole[2] > 0.05 and whole[2] > half[2]
    ((rows, kinds),) = ran.numbers(r"(\d+) rows; the most frequent of ([\d]+)")
    assert rows == 240 and kinds > 10
    assert ran.out is not None
    scores = (ran.out / "scores.csv").read_text().splitlines()
    assert len(scores) == 1 + 2 * 100
    assert len(ran.pictures) == 1


@pytest.mark.slow
def test_gradients_find_a_row_and_foretell_what_training_without_it_does(
    quick: Path, tmp_path: Path
) -> None:
    ran = execute("gradients_and_attribution", quick, tmp_path)
    assert ran.numbers(r"(\d+) rows of ([\d]+),") == [(16, 2)], "2,048 numbers: 8 modules of 256"
    hits = ran.numbers(r"cosine (\S+)   step (\d+), slot (\d+)")
    assert hits[0][1:] == (32, 1) and hits[0][0] > 1.5 * hits[1][0]
    told = np.array(ran.numbers(r"without step (\d+), slot (\d+) +predicted (\S+) +true (\S+)"))
    assert [tuple(place) for place in told[:, :2]] == [(30 + i // 4, i % 4) for i in range(12)]
    assert np.corrcoef(told[:, 2], told[:, 3])[0, 1] > 0.9
    assert np.abs(told[:, 3]).max() > 1e-4, "well above rounding"
    ((total, gap),) = ran.numbers(r"add up to (\S+) nats, gap (\S+)")
    assert abs(gap) < 0.05 * abs(total)
    ((clean, corrupt),) = ran.numbers(r"self: (\S+) with def, (\S+) with if")
    ((restored,),) = ran.numbers(r"one place brings back (\S+) nats")
    assert clean > corrupt + 0.02
    # What the last layer writes at the last token brings all of it back.
    assert restored > clean - corrupt - 0.002
    curve = ran.numbers(r"step +(\d+)   lens losses (\S+) (\S+) (\S+)")
    assert [step for step, *_ in curve] == [0, 1, 2, 4, 8, 16, 30, 32, 60]
    assert curve[0][1:] == curve[1][1:], "the first update has learning rate 0"
    assert curve[-1][3] < curve[0][3] - 1 and curve[-1][3] < curve[-1][1] - 1
    assert ran.out is not None and (ran.out / "index" / "rows.npy").is_file()
    assert len(ran.pictures) == 5
