"""Pythia's published data read from a hub, at its real size: 600 GB in 21 shards, made up as asked.

The hub cannot be reached from the tests; a server here has its interface, redirects included.
"""

from collections.abc import Callable, Iterator

import click
import numpy as np
import pytest
from brute_force import config
from click.testing import CliRunner
from numpy.typing import NDArray
from servers import RangeServer, serving

from pythia_jax.cli import main
from pythia_jax.configs import RunConfig
from pythia_jax.data import batches
from pythia_jax.data.indexed import DTYPES, HEADER, MAGIC
from pythia_jax.data.view import view

ROWS, WIDTH = 146_432_000, 2049
SHARD_BYTES = 30_000_000_000  # no multiple of a row
PREFIX = "hf://datasets/org/repo/document"


class MadeUp:
    """Content of a file, a function of the byte's number."""

    def __init__(self, size: int, read: Callable[[int, int], bytes]):
        self.size, self.read = size, read

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, span: slice) -> bytes:
        return self.read(*span.indices(self.size)[:2])


def row(number: int) -> NDArray[np.int64]:
    """The tokens of a row, as `tokens` below lays them out."""
    return token(number * WIDTH + np.arange(WIDTH))


def token(number: NDArray[np.int64]) -> NDArray[np.int64]:
    return 2 + number * 2654435761 % 50_275


def items(read: Callable[[NDArray[np.int64]], NDArray[np.int64]], dtype: str):
    """Bytes of an endless array."""
    width = np.dtype(dtype).itemsize

    def content(start: int, stop: int) -> bytes:
        first, last = start // width, -(-stop // width)
        whole = read(np.arange(first, last)).astype(dtype).tobytes()
        return whole[start - first * width : stop - first * width]

    return content


def index() -> MadeUp:
    """The `.idx` of 2.93 GB, as upstream would write it."""
    code = next(code for code, dtype in DTYPES.items() if dtype == "<u2")
    header = HEADER.pack(MAGIC, 1, code, ROWS, ROWS + 1)
    parts = [
        (len(header), lambda start, stop: header[start:stop]),
        (4 * ROWS, items(lambda i: np.full_like(i, WIDTH), "<i4")),
        (8 * ROWS, items(lambda i: i * 2 * WIDTH, "<i8")),
        (8 * (ROWS + 1), items(lambda i: i, "<i8")),
    ]

    def read(start: int, stop: int) -> bytes:
        content, offset = b"", 0
        for size, part in parts:
            first, last = max(start - offset, 0), min(stop - offset, size)
            content += part(first, last) if first < last else b""
            offset += size
        return content

    return MadeUp(sum(size for size, _ in parts), read)


@pytest.fixture(params=[True, False], ids=["with .idx", "without .idx"])
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    """A hub and the storage it redirects to, of which the latter is given."""
    tokens, size = items(token, "<u2"), ROWS * WIDTH * 2
    shards = range(0, size, SHARD_BYTES)
    files = {
        f"/document-{i:05d}-of-{len(shards) - 1:05d}.bin": MadeUp(
            min(SHARD_BYTES, size - begin),
            lambda start, stop, begin=begin: tokens(begin + start, begin + stop),
        )
        for i, begin in enumerate(shards)
    }
    assert len(files) == 21
    if request.param:
        files["/document.idx"] = index()
    front, back = RangeServer(), RangeServer(files)  # type: ignore[arg-type]
    front.back = back
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", front.url)
    with serving(front, back):
        yield back


@pytest.fixture
def pythia() -> RunConfig:
    return config(2048, 143_000, 1024, 1234, train=(PREFIX,), order="preshuffled")


def ids_shown(text: str) -> NDArray[np.int64]:
    lines = click.unstyle(text).splitlines()
    return np.array(" ".join(line for line in lines if line[:1].isdigit()).split(), np.int64)


@pytest.mark.parametrize("step", [7149, 98_000])
def test_a_whole_step_is_right_and_reads_at_most_5_mb(
    hub: RangeServer, pythia: RunConfig, step: int
) -> None:
    """Step 7149 holds the border of the first two shards."""
    text = view(batches(pythia), step, slice(None))
    expected = np.concatenate([row(number) for number in range(1024 * step, 1024 * (step + 1))])
    np.testing.assert_array_equal(ids_shown(text), expected)
    assert hub.sent <= 5_000_000


def test_the_first_and_the_last_row_are_there(hub: RangeServer, pythia: RunConfig) -> None:
    served = batches(pythia)
    np.testing.assert_array_equal(served.read(0, [0])[0], row(0))
    np.testing.assert_array_equal(served.read(142_999, [1023])[0], row(ROWS - 1))


def test_the_command_shows_step_98_000_by_little_of_it(hub: RangeServer) -> None:
    command = ["data", "view", PREFIX, "--data.order", "preshuffled", "--step", "98000"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    expected = np.concatenate([row(1024 * 98_000 + i) for i in range(4)])
    np.testing.assert_array_equal(ids_shown(result.stdout), expected)
    assert hub.sent <= 100_000


def test_shards_and_an_index_alone_are_told_from_a_corpus(hub: RangeServer) -> None:
    result = CliRunner().invoke(main, ["data", "view", PREFIX, "--step", "98000"])
    assert result.exit_code == 1
    assert "preshuffled" in result.output
    assert hub.sent <= 100_000
