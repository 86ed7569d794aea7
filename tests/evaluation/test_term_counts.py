"""Counting over a run: in parts, by many processes, killed and gone on with, it is all one."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from term_texts import make_config, upstream_counts
from tokenizers import Tokenizer

from pythia_jax import configs
from pythia_jax.configs import RunConfig
from pythia_jax.data import batches
from pythia_jax.evaluation import term_counts
from pythia_jax.evaluation.term_windows import number_key, pair_key

ABOUT = {"data": "these"}
SCRIPT = """
import sys, time
from pathlib import Path
from tokenizers import Tokenizer
from pythia_jax import configs
from pythia_jax.data import batches
from pythia_jax.evaluation import term_counts

class Slow:
    # Batches that take a while, so that there is time to be killed.
    def __init__(self, served, seconds):
        self.served, self.seconds = served, seconds
        self.batch_size, self.name, self.source = served.batch_size, served.name, served.source
    def __len__(self):
        return len(self.served)
    def __getitem__(self, step):
        time.sleep(self.seconds)
        return self.served[step]

if __name__ == "__main__":
    folder, out, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    config = configs.load(folder / "config.yaml")
    tokenizer = Tokenizer.from_file(str(config.tokenizer))
    term_counts.TASK_ROWS = 1
    served = Slow(batches(config), seconds)
    term_counts.count(
        served, tokenizer, out, 0, 12, about={"data": "these"}, every=5, workers=2
    )
"""


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    made = make_config(tmp_path)
    configs.save(made, tmp_path / "config.yaml")
    return made


def expected(config: RunConfig, start: int, stop: int) -> Counter[str]:
    """The counts of steps, row by row."""
    served, tokenizer = batches(config), Tokenizer.from_file(str(config.tokenizer))
    return upstream_counts(
        tokenizer.decode(row.tolist(), skip_special_tokens=False)
        for step in range(start, stop)
        for row in served[step]
    )


def count(config: RunConfig, folder: Path, start: int = 0, stop: int = 12, **how: Any) -> int:
    tokenizer = Tokenizer.from_file(str(config.tokenizer))
    how = {"about": ABOUT, **how}
    return term_counts.count(batches(config), tokenizer, folder, start, stop, **how)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_counts_up_to_a_step_are_those_of_its_rows_and_no_others(
    config: RunConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "counts"
    assert count(config, folder, every=4) == 48
    assert names(folder) == [f"steps-{a:06d}-{a + 4:06d}.npz" for a in (0, 4, 8)]
    for step in (4, 8, 12):
        found = term_counts.read(folder, step)
        assert found.as_dict() == expected(config, 0, step) and found.rows == 4 * step
    assert term_counts.read(folder, 8, 4).as_dict() == expected(config, 4, 8)
    assert term_counts.read(folder, 0).as_dict() == {}


def test_counts_of_chosen_things_at_chosen_steps(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "counts"
    count(config, folder, every=3)
    seen = expected(config, 0, 12)
    a, b = max((k for k in seen if k.isdecimal()), key=seen.__getitem__), 99_999
    found = term_counts.read_at(folder, [number_key(int(a)), pair_key(b, b)], [12, 0, 6])
    assert found.tolist() == [
        [expected(config, 0, step)[a], expected(config, 0, step)[f"{b}-{b}"]] for step in (12, 0, 6)
    ]
    assert found[0, 0] > found[2, 0] > 0


@pytest.mark.parametrize("task_rows", [1, 8, 1000])
def test_however_it_is_cut_up_the_counts_are_the_same(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task_rows: int
) -> None:
    monkeypatch.setattr(term_counts, "TASK_ROWS", task_rows)
    monkeypatch.setattr(term_counts, "_MERGE_EVERY", 2)
    seen = []
    count(config, tmp_path / "counts", every=5, progress=lambda *done: seen.append(done))
    assert term_counts.read(tmp_path / "counts", 12).as_dict() == expected(config, 0, 12)
    assert seen[-1] == (48, 48) and seen == sorted(seen)


def test_several_processes_count_what_one_does(config: RunConfig, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    one, many = tmp_path / "one", tmp_path / "many"
    count(config, one, every=5)
    subprocess.run([sys.executable, script, tmp_path, many, "0"], check=True, timeout=120)
    assert names(one) == names(many)
    for name in names(one):
        assert (one / name).read_bytes() == (many / name).read_bytes()


def test_parts_counted_by_several_machines_make_one_whole(
    config: RunConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "counts"
    assert count(config, folder, 7, 12, every=4) == 20
    with pytest.raises(FileNotFoundError, match=r"steps 0 to 7 .* not counted.*--start 0 --stop 7"):
        term_counts.read(folder, 12)
    assert count(config, folder, 0, 5, every=4) == 20
    # What is between them, and nothing of what is there.
    assert count(config, folder, every=4) == 8
    assert count(config, folder, every=4) == 0
    assert term_counts.read(folder, 12).as_dict() == expected(config, 0, 12)


def test_killed_and_started_again_it_counts_nothing_twice(
    config: RunConfig, tmp_path: Path
) -> None:
    script, folder = tmp_path / "script.py", tmp_path / "counts"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, script, tmp_path, folder, "0.3"], start_new_session=True
    )
    first, end = folder / "steps-000000-000005.npz", time.monotonic() + 120
    while not first.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert first.name in names(folder) and "steps-000010-000012.npz" not in names(folder)
    written = first.stat().st_mtime_ns
    counted = count(config, folder, every=5)
    assert counted in (28, 8)  # all but the first part, or but the first two
    assert first.stat().st_mtime_ns == written
    assert term_counts.read(folder, 12).as_dict() == expected(config, 0, 12)


def test_a_step_inside_a_part_is_refused(config: RunConfig, tmp_path: Path) -> None:
    count(config, tmp_path / "counts", every=6)
    with pytest.raises(ValueError, match=r"steps-000006-000012\.npz counts steps 6 to 12"):
        term_counts.read(tmp_path / "counts", 7)
    with pytest.raises(FileNotFoundError, match="steps 12 to 13"):
        term_counts.read(tmp_path / "counts", 13)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        term_counts.read(tmp_path / "nothing", 6)


def test_counts_of_something_else_are_neither_gone_on_with_nor_added(
    config: RunConfig, tmp_path: Path
) -> None:
    folder, other = tmp_path / "counts", tmp_path / "other"
    count(config, folder, 0, 6, every=6)
    with pytest.raises(ValueError, match="than asked for: data was 'these', is 'those'"):
        count(config, folder, about={"data": "those"}, every=6)
    assert len(names(folder)) == 1
    count(config, other, 6, 12, about={"data": "those"}, every=6)
    (other / "steps-000006-000012.npz").rename(folder / "steps-000006-000012.npz")
    with pytest.raises(ValueError, match=r"than .*-000006\.npz: data was 'those', is 'these'"):
        term_counts.read(folder, 12)


def test_steps_counted_twice_are_refused(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "counts"
    count(config, folder, 0, 6, every=6)
    copied = (folder / "steps-000000-000006.npz").read_bytes()
    (folder / "steps-000003-000009.npz").write_bytes(copied)
    for again in (lambda: term_counts.read(folder, 6), lambda: count(config, folder)):
        with pytest.raises(ValueError, match="count some steps twice"):
            again()


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut off", None])
def test_a_damaged_file_is_named(config: RunConfig, tmp_path: Path, damage: bytes | None) -> None:
    count(config, tmp_path / "counts")
    (path,) = (tmp_path / "counts").iterdir()
    if damage is None:
        np.savez(path, something=np.zeros(3))
    else:
        path.write_bytes(damage)
    with pytest.raises(ValueError, match=f"{path.name}: not a whole file of counts"):
        term_counts.read(tmp_path / "counts", 12)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"start": -1}, "steps -1 to 12"),
        ({"start": 5, "stop": 5}, "steps 5 to 5"),
        ({"stop": 13}, "has steps 0 to 12"),
        ({"every": 0}, "at least 1"),
        ({"workers": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_counted_is_refused_and_leaves_nothing(
    config: RunConfig, tmp_path: Path, how: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        count(config, tmp_path / "counts", **how)
    assert not (tmp_path / "counts").exists()


def test_counting_processes_do_without_jax() -> None:
    code = (
        "import sys, pythia_jax.evaluation.term_counts;"
        "sys.exit(bool({'jax', 'torch', 'transformers', 'lm_eval'} & set(sys.modules)))"
    )
    here = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=here, check=False).returncode == 0
