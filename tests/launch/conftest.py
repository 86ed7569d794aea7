"""A world of stand-ins, and a config that could be trained in a cloud."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from stand_ins import World


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """The stand-ins, first on PATH; nothing of the real clouds can be reached."""
    world = World(tmp_path)
    monkeypatch.setenv("PATH", f"{world.bin}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    yield world
    for pid in world.alive():
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "night.yaml"
    path.write_text(
        "name: night\n"
        "model: {size: 14m}\n"
        "data: {train: ['gs://bucket/data/train'], sequence_length: 128}\n"
        "training: {steps: 30, batch_size: 64}\n"
        "checkpoint: {directory: /mnt/storage/night}\n"
    )
    return path
