"""A folder as transformers writes it, and a copy of it."""

import functools
import shutil
from pathlib import Path

import pytest
from hf_folders import write_theirs
from neox_files import write_into


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return write_theirs(tmp_path_factory.mktemp("theirs") / "model")


@pytest.fixture
def folder(theirs, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(theirs, tmp_path / "model"))


@pytest.fixture
def write(tmp_path):
    """Writes a GPT-NeoX file (`neox_files.write_into`)."""
    return functools.partial(write_into, tmp_path)
