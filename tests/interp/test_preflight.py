"""Estimates: the compiler's bytes, free memory as the machine tells it, words for numbers."""

import shutil

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from pythia_jax.interp import preflight


def test_a_programs_memory_is_that_of_its_temporaries_and_results():
    def squares(x):
        return (jnp.sort(x) @ x.T) * 2

    compiled = jax.jit(squares).lower(jax.ShapeDtypeStruct((500, 300), jnp.float32)).compile()
    once, thrice = (preflight.memory_of(compiled, outputs=n) for n in (1, 3))
    assert thrice.wanted - once.wanted == 2 * 500 * 500 * 4
    assert once.wanted >= 500 * 500 * 4 + 500 * 300 * 4
    assert once.free is not None
    assert once.fits


def test_what_is_more_than_free_does_not_fit_and_the_refusal_has_both_numbers():
    memory = preflight.Memory(3 * 10**9, 2 * 10**9)
    assert not memory.fits
    assert preflight.Memory(3 * 10**9, None).fits
    told = str(preflight.refusal(memory, "an index"))
    assert told.startswith("an index takes 3 GB of memory on each device")
    assert "2 GB are free" in told


def test_work_is_refused_for_what_it_keeps_and_what_its_program_wants_together(monkeypatch):
    x = jnp.zeros((500, 300))
    program = jax.jit(lambda x: x @ x.T).lower(x).compile()
    place = NamedSharding(AbstractMesh((4,), ("some",)), PartitionSpec("some"))
    cut = jax.ShapeDtypeStruct((500, 300), jnp.float32, sharding=place)
    kept = 3 * 500 * 300 * 4 + 2 * 500 * 300 * 4 // 4
    wanted = kept + preflight.memory_of(program).wanted
    assert wanted >= kept + 500 * 500 * 4

    def check(free, x=x):
        monkeypatch.setattr(preflight, "free_each", lambda: free)
        preflight.check_memory("it", (3, x), (2, {"a": cut}), program=lambda: program, advice="do")

    check(wanted)
    check(None)
    for free, told in ((0, kept), (wanted - 1, wanted)):  # the program is asked for if need be
        numbers = f"it takes {preflight.in_bytes(told)} .* {preflight.in_bytes(free)} are free; do"
        with pytest.raises(MemoryError, match=numbers):
            check(free)
    # Inside of a transformation nothing is known.
    jax.jit(lambda x: check(0, x))(x)


def test_results_that_take_an_argument_s_place_want_no_room():
    x = jax.ShapeDtypeStruct((500, 300), jnp.float32)
    new, same = (
        preflight.memory_of(jax.jit(lambda x: x + 1, donate_argnums=of).lower(x).compile()).wanted
        for of in ((), (0,))
    )
    assert new - same == 500 * 300 * 4


def test_time_is_told_once_of_a_second_piece_since_a_first_compiles(monkeypatch, caplog):
    clock = [0.0]
    monkeypatch.setattr(preflight.time, "perf_counter", lambda: clock[0])
    with caplog.at_level("INFO"):
        for piece in preflight.timed(iter("abcde"), 5, "the rest"):
            clock[0] += 1000 if piece == "a" else 50
        assert caplog.messages == ["the rest: about 2.5 min"]
        assert list(preflight.timed("ab", 2, "nothing")) == ["a", "b"]
    assert len(caplog.messages) == 1


def test_what_the_host_cannot_hold_is_refused_with_the_numbers(monkeypatch):
    monkeypatch.setattr(preflight, "host_memory", lambda: 2000)
    preflight.check_host(2000, "factors")
    with pytest.raises(MemoryError, match="factors: 3 kB of memory are wanted, and 2 kB are free"):
        preflight.check_host(3000, "factors")


def test_a_group_s_limit_is_less_than_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "_GROUPS", tmp_path)
    free = preflight.host_memory()
    assert free is not None
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert preflight.host_memory() == 4_000_000
    (tmp_path / "memory.max").write_text("max\n")
    again = preflight.host_memory()
    assert again is not None and again > 10**7


def test_disk_is_counted_where_the_folder_will_be(tmp_path, monkeypatch):
    asked = []

    def usage(folder):
        asked.append(folder)
        return shutil._ntuple_diskusage(10**9, 0, 5000)  # type: ignore[attr-defined]

    monkeypatch.setattr(preflight.shutil, "disk_usage", usage)
    deep = tmp_path / "not" / "there"
    assert preflight.check_disk(deep, 5000, "it") == 5000
    assert asked == [tmp_path]
    assert preflight.check_disk(deep, 9000, "it", there=4000) == 5000
    with pytest.raises(OSError, match="it takes 9 kB of disk, and 5 kB are free"):
        preflight.check_disk(deep, 9000, "it")


@pytest.mark.parametrize(
    ("count", "told"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1234567, "1.23 MB"),
        (3.6e12, "3.6 TB"),
        (5e15, "5e+03 TB"),
    ],
)
def test_bytes_in_words(count, told):
    assert preflight.in_bytes(count) == told


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(3, "3 s"), (119, "119 s"), (150, "2.5 min"), (9000, "2.5 h"), (1e6, "11.6 days")],
)
def test_time_in_words(seconds, told):
    assert preflight.in_time(seconds) == told
