"""Files are whole or as they were, and a lock keeps others out and goes with its process."""

import multiprocessing
import os
from pathlib import Path

import pytest

from pythia_jax.files import locked, write_whole


def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", b"old")

    def fail(self, target):
        raise OSError("no")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no"):
        write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_is_right_already_is_left_alone(tmp_path):
    write_whole(tmp_path / "file", b"content")
    os.utime(tmp_path / "file", (1, 1))
    write_whole(str(tmp_path / "file"), b"content")
    assert (tmp_path / "file").stat().st_mtime == 1
    write_whole(tmp_path / "file", b"other")
    assert (tmp_path / "file").read_bytes() == b"other"


def test_content_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.fstat(fd).st_size))
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda *a: (done.append("named"), replace(*a))[1])
    write_whole(tmp_path / "file", b"content")
    assert done == [7, "named"]


def hold(path, taken, leave):
    with locked(path):
        taken.set()
        leave.wait()


def test_a_lock_keeps_others_out_until_its_process_is_killed(tmp_path):
    context = multiprocessing.get_context("spawn")
    taken, leave = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "lock", taken, leave))
    process.start()
    taken.wait()
    with pytest.raises(BlockingIOError), locked(tmp_path / "lock", seconds=0.2):
        pass
    process.kill()
    with locked(tmp_path / "lock"):
        pass
    process.join()
