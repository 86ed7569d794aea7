"""Saves on a disk that fails at one operation after another; run with faulty_disk.c preloaded.

    python faulty_save.py CONFIG MODE FIRST STRIDE

For every STRIDE-th operation of a save, from FIRST on: a run folder with a good checkpoint, a save
that meets the fault there, and a look at what can be gone on from afterwards. Prints one JSON
object: how many operations a save has, in how many saves a fault was met, and how each ended.
"""

import ctypes
import dataclasses
import json
import shutil
import sys
from collections import Counter

from checkpoint_runs import folder_of, like, random_state
from small_runs import assert_same_bits

from pythia_jax import configs
from pythia_jax.configs import RunConfig
from pythia_jax.training.checkpoints import CheckpointError, Checkpoints

MODES = {"count": 0, "error": 1, "full": 2, "dead": 3, "kill": 4}
disk = ctypes.CDLL(None)


def in_folder(config: RunConfig, name: str) -> RunConfig:
    folder = str(folder_of(config).with_name(name))
    return dataclasses.replace(
        config, checkpoint=dataclasses.replace(config.checkpoint, directory=folder)
    )


def save(config: RunConfig, mode: str, first: int) -> bool:
    """Save step 1 on a disk that fails at operation `first`; whether it was said to be well."""
    shape = like(config)
    try:
        with Checkpoints(config, shape) as run:
            assert run.restore_newest() is not None
            disk.disk_arm(str(folder_of(config)).encode(), first, MODES[mode])
            run.save(1, random_state(shape, 1), resume=True)
            run.check()
    except CheckpointError as error:
        assert str(folder_of(config)) in str(error)
        return False
    finally:
        met = disk.disk_failed()
        count = disk.disk_count()
        disk.disk_arm(b"", -1, 0)
        print(f"{mode} {first}: {met} of {count} operations failed", file=sys.stderr, flush=True)
    return True


def newest(config: RunConfig) -> int:
    """The step that can be gone on from; its bits must be those that were saved."""
    shape = like(config)
    with Checkpoints(config, shape) as run:
        found = run.restore_newest()
        assert found is not None, "the good checkpoint is lost"
        step, state = found
        assert_same_bits(state, random_state(shape, step))
        if step == 0:  # what is left of the failed one must not be in the way
            run.save(1, random_state(shape, 1), resume=True)
    return step


def main() -> None:
    config, mode = configs.load(sys.argv[1]), sys.argv[2]
    first, stride = int(sys.argv[3]), int(sys.argv[4])
    good = folder_of(config)
    trial = in_folder(config, "trial")
    shutil.copytree(good, folder_of(trial))
    disk.disk_arm(str(folder_of(trial)).encode(), -1, 0)
    assert save(trial, "count", -1)
    operations = int(disk.disk_counted())
    shutil.rmtree(folder_of(trial))
    ends: Counter[str] = Counter()
    for at in range(first, operations, stride):
        # Threads of a failed save may go on for a while, as they cannot once a process has ended:
        # each has a folder of its own, and it is looked at under another name.
        trial, left = in_folder(config, f"trial-{at}"), in_folder(config, f"left-{at}")
        shutil.copytree(good, folder_of(trial))
        well = save(trial, mode, at)
        folder_of(trial).rename(folder_of(left))
        step = newest(left)
        assert step == 1 or not well, f"operation {at}: said to be saved, and is not there"
        assert newest(left) == 1
        ends[f"{'well' if well else 'error'}, then step {step}"] += 1
    print(json.dumps({"operations": operations, "ends": ends}))


if __name__ == "__main__":
    main()
