"""The lease on a run folder on a bucket: one holder, and a new one when that one is gone."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pythia_jax.training import lease
from pythia_jax.training.bucket import Bucket
from pythia_jax.training.lease import Lease, LeaseError


@pytest.fixture(autouse=True)
def short_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LIFE_S", 1.0)
    monkeypatch.setattr(lease, "RENEW_S", 0.1)


def abandoned(bucket: Any, mark: Path) -> Lease:
    """A lease whose holder was killed."""
    left = Lease(Bucket(bucket.url), mark).__enter__()
    left._leaving.set()
    left._thread.join()
    return left


def test_a_second_run_is_refused_and_told_who_holds_the_folder(bucket: Any, tmp_path: Path) -> None:
    with Lease(Bucket(bucket.url), tmp_path / "a"):
        time.sleep(1.5)  # longer than a lease lives that is not renewed
        who = r"another run is training in this folder: process \d+ on .+, until 20\d\d-"
        with pytest.raises(LeaseError, match=who):
            Lease(Bucket(bucket.url), tmp_path / "b").__enter__()
    assert bucket.names() == []
    with Lease(Bucket(bucket.url), tmp_path / "b"):
        assert bucket.names() == [".lease"]


def test_the_lease_of_a_killed_run_ends_by_itself(bucket: Any, tmp_path: Path) -> None:
    abandoned(bucket, tmp_path / "a")
    began = time.monotonic()
    with Lease(Bucket(bucket.url), tmp_path / "b") as mine:
        assert 0.3 < time.monotonic() - began < 5
        mine.confirm()


def test_a_machine_does_not_wait_for_a_process_of_its_own_that_is_dead(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LIFE_S", 60.0)
    abandoned(bucket, tmp_path / "a")
    began = time.monotonic()
    with Lease(Bucket(bucket.url), tmp_path / "a"):
        assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"owner": "x", "until": 4e9, "who": "a clock ahead"}']
)
def test_an_odd_lease_holds_for_the_usual_time(bucket: Any, tmp_path: Path, content: bytes) -> None:
    bucket.put(".lease", content)
    began = time.monotonic()
    with Lease(Bucket(bucket.url), tmp_path / "a"):
        assert 0.9 < time.monotonic() - began < 5


def test_who_was_taken_over_is_told_and_writes_no_more(bucket: Any, tmp_path: Path) -> None:
    late = abandoned(bucket, tmp_path / "a")
    with Lease(Bucket(bucket.url), tmp_path / "b") as new:
        late.check()  # it cannot know yet
        with pytest.raises(LeaseError, match=r"another run has taken over this folder \(process"):
            late.confirm()
        with pytest.raises(LeaseError):
            late.check()
        late.__exit__()
        time.sleep(0.3)
        new.check()
        assert bucket.names() == [".lease"], "the lease of the new holder is gone"


def test_a_lease_that_was_deleted_is_lost(bucket: Any, tmp_path: Path) -> None:
    with Lease(Bucket(bucket.url), tmp_path / "a") as mine:
        Bucket(bucket.url).write(".lease", None)
        time.sleep(0.5)
        with pytest.raises(LeaseError, match="its lease is gone"):
            mine.check()


def test_a_renewal_whose_answer_was_lost_is_still_ours(bucket: Any, tmp_path: Path) -> None:
    class Deaf(Bucket):
        def write(self, name: str, content: bytes | None, **how: Any) -> bytes | None:
            written = super().write(name, content, **how)
            return None if silent else written

    silent = False
    with Lease(Deaf(bucket.url), tmp_path / "a") as mine:
        silent = True
        time.sleep(0.5)
        mine.check()
        silent = False
        time.sleep(0.3)
        mine.confirm()


def test_of_many_that_come_at_once_one_gets_it(bucket: Any, tmp_path: Path) -> None:
    got, refused, over = [], [], threading.Barrier(6)

    def come(number: int) -> None:
        mine = Lease(Bucket(bucket.url), tmp_path / str(number))
        try:
            got.append(mine.__enter__())
        except LeaseError as error:
            refused.append(error)
        over.wait()

    threads = [threading.Thread(target=come, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 5)
    owner = json.loads(bucket.content(".lease"))["owner"]
    assert owner == got[0]._owner
    got[0].__exit__()
