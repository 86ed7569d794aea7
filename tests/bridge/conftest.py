"""A folder as transformers writes it, and a copy of it."""

import shutil
from pathlib import Path

import pytest
from hf_folders import write_theirs


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return write_theirs(tmp_path_factory.mktemp("theirs") / "model")


@pytest.fixture
def folder(theirs, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(theirs, tmp_path / "model"))
