"""Folders replaced whole: nothing is lost, nothing is left half-written, whatever goes wrong."""

import os
import re
from pathlib import Path

import pytest

from pythia_jax.bridge import replacing as module
from pythia_jax.bridge.replacing import interrupted, replacing

DEAD = 2**22 + 1  # more than Linux ever gives out


def is_ours(folder: Path) -> bool:
    return {path.name for path in folder.iterdir()} <= {"a", "b", "c"}


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write(folder: Path, content: str = "new", names: str = "ab") -> None:
    with replacing(folder, is_ours) as partial:
        assert not list(partial.iterdir())
        for name in names:
            (partial / name).write_text(content)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with `model`, ours and old, in it and nothing else."""
    write(tmp_path / "place" / "model", "old", "abc")
    return tmp_path / "place"


def test_new_folder_has_what_was_written_and_nothing_beside_it(tmp_path):
    write(tmp_path / "a" / "b" / "new")
    assert listing(tmp_path) == {"a/b/new/a": b"new", "a/b/new/b": b"new"}
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["new"]


def test_older_folder_is_there_until_the_new_one_is_complete_and_then_gone(place):
    with replacing(place / "model", is_ours) as partial:
        (partial / "b").write_text("new")
        assert (place / "model" / "c").read_text() == "old"
    assert listing(place) == {"model/b": b"new"}
    assert [path.name for path in place.iterdir()] == ["model"]


@pytest.mark.parametrize("existing", [False, True], ids=["new", "over an older one"])
def test_block_that_fails_leaves_what_was_there(existing, place):
    before = listing(place)
    with (
        pytest.raises(ZeroDivisionError),
        replacing(place / ("model" if existing else "other"), is_ours) as partial,
    ):
        (partial / "a").write_text("half")
        raise ZeroDivisionError
    assert listing(place) == before
    assert [path.name for path in place.iterdir()] == ["model"]


def test_folders_made_for_a_block_that_fails_are_gone_again(place):
    with (
        pytest.raises(ZeroDivisionError),
        replacing(place / "more" / "and" / "model", is_ours),
    ):
        raise ZeroDivisionError
    assert [path.name for path in place.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["notes.txt", "sub/a", ".hidden"])
def test_folder_that_holds_anything_else_is_not_replaced(name, place):
    (place / "model" / name).parent.mkdir(exist_ok=True)
    (place / "model" / name).write_text("keep me")
    before = listing(place)
    with pytest.raises(FileExistsError, match=re.escape(str(place / "model"))):
        write(place / "model")
    assert listing(place) == before


def test_predicate_may_say_itself_what_is_in_the_way(place):
    def refuse(folder: Path) -> bool:
        raise FileExistsError(f"{folder.name} is dear to me")

    with (
        pytest.raises(FileExistsError, match="model is dear to me"),
        replacing(place / "model", refuse),
    ):
        pass
    assert listing(place).keys() == {"model/a", "model/b", "model/c"}


def test_what_comes_to_the_target_meanwhile_is_not_deleted(place):
    with (
        pytest.raises(FileExistsError, match="model"),
        replacing(place / "model", is_ours) as partial,
    ):
        (partial / "a").write_text("new")
        (place / "model" / "notes.txt").write_text("keep me")
    assert listing(place / "model")["notes.txt"] == b"keep me"
    assert [path.name for path in place.iterdir()] == ["model"]


def test_file_in_the_way_is_not_replaced(tmp_path):
    (tmp_path / "mine").write_text("keep me")
    with pytest.raises(FileExistsError, match="mine is a file"):
        write(tmp_path / "mine")
    assert listing(tmp_path) == {"mine": b"keep me"}


def test_empty_folder_is_taken_without_asking(tmp_path):
    (tmp_path / "empty").mkdir()
    with replacing(tmp_path / "empty", lambda folder: False) as partial:
        (partial / "a").write_text("new")
    assert listing(tmp_path) == {"empty/a": b"new"}


@pytest.mark.parametrize("name", [".", "", "../here", ".."])
def test_folder_that_we_stand_in_is_not_replaced(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="current folder"):
        write(Path(name))


def test_link_to_a_folder_stays_one(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert listing(tmp_path / "elsewhere") == {"a": b"new", "b": b"new"}


# Processes that were killed.


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
        patch.setattr(module.os, "getpid", lambda: DEAD)
        # Somebody killed does not tidy up either.
        patch.setattr(module.shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(Kill):
            saving()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_kill_in_the_middle_of_the_moves_loses_nothing_and_is_put_right(number, place, monkeypatch):
    folder = place / "model"
    before = listing(folder)
    kill_at_rename(monkeypatch, number, lambda: write(folder))
    held = [
        listing(path)
        for path in place.iterdir()
        if not path.name.startswith(f".{folder.name}.partial")
    ]
    assert before in held
    assert (interrupted(folder) is not None) == (number == 2)
    if number == 2:
        assert not folder.exists()
        assert interrupted(folder) == place / ".model.replaced"
        # One that fails puts back what was there.
        with pytest.raises(ZeroDivisionError), replacing(folder, is_ours):
            raise ZeroDivisionError
        assert listing(folder) == before
    write(folder)
    assert [path.name for path in place.iterdir()] == ["model"]
    assert listing(folder) == {"a": b"new", "b": b"new"}


def test_failed_second_rename_puts_the_first_back(place, monkeypatch):
    before, real = listing(place), Path.rename

    def rename(self, target):
        if ".partial" in self.name:
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output"):
        write(place / "model")
    assert listing(place) == before


def test_only_the_partial_folders_of_dead_processes_are_removed(tmp_path):
    dead, alive = f".out.partial-{DEAD}", f".out.partial-{os.getppid()}"
    for name in (dead, alive, ".out.partial-mine", ".outer.partial-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_bytes(b"half")
    write(tmp_path / "out")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"out", alive, ".out.partial-mine", ".outer.partial-1"}


@pytest.mark.parametrize("target", [True, False], ids=["beside a folder", "alone"])
def test_hidden_folder_of_somebody_else_is_not_touched(target, place):
    other = place / (".model.replaced" if target else ".none.replaced")
    other.mkdir()
    (other / "notes.txt").write_text("keep me")
    before = listing(place)
    with pytest.raises(FileExistsError, match="replaced"):
        write(place / ("model" if target else "none"))
    assert listing(place) == before
