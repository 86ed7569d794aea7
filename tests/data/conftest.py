"""Shared by the tests of remote data."""

import numpy as np
import pytest

from pythia_jax.data import IndexedDatasetWriter, links, open


@pytest.fixture
def short_pauses(monkeypatch):
    """Pauses of a test, not of a data centre."""
    monkeypatch.setattr(links, "FIRST_DELAY_S", 0.01)


@pytest.fixture(scope="session")
def local_dataset(tmp_path_factory):
    """A dataset of 3,000 documents to compare with, and its two files by suffix."""
    prefix = tmp_path_factory.mktemp("data") / "data"
    rng = np.random.default_rng(5)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        sizes = rng.integers(0, 400, 3000)
        writer.add_documents(rng.integers(0, 50277, sizes.sum()), sizes)
    return open(prefix), {s: prefix.with_suffix(s).read_bytes() for s in (".bin", ".idx")}
