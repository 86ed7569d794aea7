"""The order of a split in numbers: epochs, samples, tokens, where epochs end, memory and time."""

import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pythia_jax.configs import RunConfig
from pythia_jax.data.batches import Batches, batches
from pythia_jax.data.samples import BlendedSamples, NeoxSamples, Samples

_MOST_EPOCHS = 8  # whose ends are listed


def describe_order(config: RunConfig, split: str = "train") -> str:
    """Builds the order of a split, or takes it from the cache, and says what it is, in lines.

    All epochs of a path are shuffled together, so none has an end of its own. What is told is the
    step by which as many tokens have been served as an epoch holds; a sample counts for
    sequence_length tokens, since its first is the last of another.

    Raises:
        As `batches`.
    """
    began = time.perf_counter()
    served = batches(config, split)
    seconds = time.perf_counter() - began
    return "\n".join([*_split_lines(served, config), *_path_lines(served, config, split, seconds)])


def _split_lines(served: Batches, config: RunConfig) -> Iterator[str]:
    rows, length = served.num_batches * served.batch_size, config.data.sequence_length
    yield (
        f"{served.name}: {served.num_batches:,} steps of {served.batch_size:,} rows, "
        f"{rows:,} samples, {rows * length:,} tokens"
    )


def _path_lines(served: Batches, config: RunConfig, split: str, seconds: float) -> Iterator[str]:
    samples = served.samples
    if not isinstance(samples, NeoxSamples | BlendedSamples):
        yield f"{served.source}: {len(samples):,} rows, read as they lie"
        return
    members = samples.members if isinstance(samples, BlendedSamples) else (samples,)
    for number, member in enumerate(members):
        order, length = member.order, config.data.sequence_length
        documents = len(order.document_order) // order.epochs
        tokens = _tokens(member)
        yield f"{member.dataset.prefix}:"
        yield f"  documents   {documents:,}, {tokens:,} tokens"
        yield f"  epochs      {order.epochs:,}, shuffled together"
        yield f"  samples     {len(order):,} are served, one fewer than there are, then again"
        taken = _served_before(samples, number, served)
        yield f"  used        {taken[-1]:,} ({taken[-1] / len(order):.1%})"
        for epoch in range(1, min(order.epochs, _MOST_EPOCHS) + 1):
            yield f"  epoch {epoch:<6}" + _end_of(epoch, tokens, length, taken)
        if order.epochs > _MOST_EPOCHS:
            yield f"  ...         and {order.epochs - _MOST_EPOCHS:,} more"
    size = _bytes(samples)
    yield f"order: {size / 2**20:,.1f} MiB, ready in {seconds:.1f} s"


def _tokens(member: NeoxSamples) -> int:
    """Tokens of one epoch."""
    order = member.order
    documents = np.asarray(order.document_order)
    first, last = int(documents.min()), int(documents.max())
    return int(member.dataset.sizes[first : last + 1].sum(dtype=np.int64))


def _served_before(samples: Samples, number: int, served: Batches) -> NDArray[np.int64]:
    """Samples of one path that were served before each step, and at the end, `[steps + 1]`."""
    rows = np.arange(served.num_batches + 1) * served.batch_size
    if not isinstance(samples, BlendedSamples):
        return rows
    rounds, rest = np.divmod(rows, len(samples))
    own = np.flatnonzero(samples.dataset == number)
    return rounds * len(own) + np.searchsorted(own, rest)


def _end_of(epoch: int, tokens: int, length: int, taken: NDArray[np.int64]) -> str:
    """By which step as many tokens were served as so many epochs hold."""
    needed = -(-epoch * tokens // length)
    step = int(np.searchsorted(taken, needed))
    if step < len(taken):
        return f"{epoch * tokens:,} tokens, served by the end of step {step - 1:,}"
    return f"{epoch * tokens:,} tokens, more than are served"


def _bytes(samples: NeoxSamples | BlendedSamples) -> int:
    if isinstance(samples, BlendedSamples):
        own = samples.dataset.nbytes + samples.sample.nbytes
        return own + sum(map(_bytes, samples.members))
    order = samples.order
    return order.document_order.nbytes + order.sample_index.nbytes + order.shuffle.nbytes
