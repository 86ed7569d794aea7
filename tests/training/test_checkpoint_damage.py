"""A damaged checkpoint is named and passed over: what is restored is what was saved, or nothing."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import pytest
from checkpoint_runs import folder_of, like, load, opened, random_state, save_steps, warnings
from small_runs import Make, assert_same_bits

from pythia_jax.bridge import CheckpointError
from pythia_jax.configs import RunConfig
from pythia_jax.training.stored import DamagedError, read_about, read_state

Damage = Callable[[Path, random.Random], None]


def flip_a_bit(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def overwrite_a_stretch(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    start = draw.randrange(len(content) or 1)
    content[start : start + 16] = bytes(len(content[start : start + 16]))
    file.write_bytes(content)


def truncate(file: Path, draw: random.Random) -> None:
    os.truncate(file, file.stat().st_size * draw.randrange(4) // 4)


def delete(file: Path, draw: random.Random) -> None:
    file.unlink()


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def outcome(config: RunConfig, checkpoint: Path) -> bool:
    """Whether a step is restored as it was saved; False if it is refused. Anything else fails."""
    shape = like(config)
    try:
        about = read_about(checkpoint)
        state = read_state(checkpoint, shape, about["digests"])
    except DamagedError as error:
        assert str(checkpoint) in str(error)
        return False
    assert about["whole"]
    assert_same_bits(state, random_state(shape, int(checkpoint.name)))
    return True


@pytest.mark.parametrize("damage", [flip_a_bit, overwrite_a_stretch, truncate, delete])
def test_no_damage_to_any_file_goes_unseen(make_config: Make, damage: Damage) -> None:
    refused = damage_each_file(make_config(), damage, rounds=1)
    assert refused, "no damage was of any consequence: the test proves nothing"


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip_a_bit, overwrite_a_stretch, truncate])
def test_no_damage_to_any_file_goes_unseen_wherever_it_falls(
    make_config: Make, damage: Damage
) -> None:
    assert damage_each_file(make_config(), damage, rounds=40)


def damage_each_file(config: RunConfig, damage: Damage, rounds: int) -> set[str]:
    """Damage each file of a checkpoint by itself; the names of those whose damage was refused."""
    save_steps(config, 2)
    checkpoint = folder_of(config) / "checkpoints" / "2"
    assert outcome(config, checkpoint)
    draw, refused = random.Random(0), set()
    for file in files_of(checkpoint):
        content = file.read_bytes()
        for _ in range(rounds):
            damage(file, draw)
            if not outcome(config, checkpoint):
                refused.add(str(file.relative_to(checkpoint)))
            file.write_bytes(content)
    assert outcome(config, checkpoint), "the damage was not undone: the rounds before prove nothing"
    return refused


def damage_arrays(checkpoint: Path) -> None:
    """Flip a bit in each file of arrays, or of what is said of them."""
    for file in files_of(checkpoint / "state"):
        flip_a_bit(file, random.Random(1))


def test_the_newest_good_one_is_taken_and_the_damaged_moved_aside(
    make_config: Make, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config()
    states = save_steps(config, 0, 1, 2, 3, resume=True)
    damaged = [folder_of(config) / place for place in ("resume/3", "checkpoints/2")]
    for checkpoint in damaged:
        damage_arrays(checkpoint)
    with opened(config) as run:
        found = run.restore_newest()
        assert found is not None and found[0] == 1
        assert_same_bits(found[1], states[1])
        told = warnings(caplog)
        assert all(f"{checkpoint}: " in told for checkpoint in damaged)
        assert all(str(checkpoint) + ".damaged" in told for checkpoint in damaged)
        for step in (2, 3):  # their places are free again
            run.save(step, states[step], resume=True)
    with opened(config) as run:
        found = run.restore_newest()
        assert found is not None and found[0] == 3
    assert all(
        files_of(checkpoint.with_name(f"{checkpoint.name}.damaged")) for checkpoint in damaged
    )
    damage_arrays(damaged[0])
    with opened(config) as run:
        found = run.restore_newest()
        assert found is not None and found[0] == 2
    assert (folder_of(config) / "resume" / "3.damaged-2").is_dir(), "the one before it was replaced"


def test_with_no_good_one_left_all_are_named_and_stay(make_config: Make) -> None:
    config = make_config()
    save_steps(config, 0, 1)
    folder = folder_of(config) / "checkpoints"
    for step in ("0", "1"):
        damage_arrays(folder / step)
    before = {path: path.read_bytes() for path in files_of(folder)}
    both = rf"^{folder.parent}: .*all are damaged: checkpoints/ 0, 1\. Bring one back"
    with opened(config) as run, pytest.raises(RuntimeError, match=both):
        run.restore_newest()
    assert {path: path.read_bytes() for path in files_of(folder)} == before


def test_parameters_alone_are_checked_too(
    make_config: Make, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config()
    states = save_steps(config, 0, 1)
    folder = folder_of(config)
    assert load(config, dtype=jnp.bfloat16).step == 1
    assert not warnings(caplog)
    damage_arrays(folder / "checkpoints" / "1")
    with pytest.raises(CheckpointError, match=rf"{folder}/checkpoints/1: "):
        load(config, 1, jnp.bfloat16)
    found = load(config)
    assert found.step == 0 and f"{folder}/checkpoints/1: " in warnings(caplog)
    assert_same_bits(found.params, states[0].params)
    damage_arrays(folder / "checkpoints" / "0")
    both = f"^{folder}: every checkpoint in it is damaged: 0, 1$"
    with pytest.raises(CheckpointError, match=both):
        load(config)
    assert (folder / "checkpoints" / "1").is_dir(), "who only reads moves nothing"


def test_a_changed_array_is_named(make_config: Make) -> None:
    config = make_config()
    states = save_steps(config, 0)
    checkpoint = folder_of(config) / "checkpoints" / "0"
    saved = read_about(checkpoint)["digests"]
    name = "params/layers/mlp/dense_h_to_4h/kernel"
    with pytest.raises(DamagedError, match=rf"0: {name} differs from what was saved"):
        read_state(checkpoint, like(config), {**saved, name: "0" * 16})
    assert_same_bits(read_state(checkpoint, like(config), saved), states[0])


def test_a_checkpoint_under_the_name_of_another_step_is_refused(make_config: Make) -> None:
    config = make_config()
    save_steps(config, 0)
    folder = folder_of(config) / "checkpoints"
    shutil.copytree(folder / "0", folder / "5")
    with pytest.raises(CheckpointError, match="5: holds step 0, not what its name says"):
        load(config, 5)


def test_rights_and_memory_are_no_damage(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    save_steps(config, 0)
    checkpoint = folder_of(config) / "checkpoints" / "0"

    def fail(error: Exception) -> Callable[..., bytes]:
        def read(path: Path) -> bytes:
            raise error

        return read

    for error in (PermissionError("no"), MemoryError(), ValueError("UNAVAILABLE: try again")):
        monkeypatch.setattr(Path, "read_bytes", fail(error))
        with pytest.raises(type(error)):
            read_about(checkpoint)
    monkeypatch.setattr(Path, "read_bytes", fail(OSError(5, "Input/output error")))
    with pytest.raises(DamagedError, match="Input/output error"):
        read_about(checkpoint)
