"""Log-probabilities of continuations, and greedy continuations, for many requests at once.

Requests that share their input share its forward pass: choices of one token, and inputs that are
the beginning of another. What is left is sorted by length and cut into batches of a few widths, so
that little is padded and few programs are compiled. A program runs the layers over a batch and the
unembedding over the positions asked for alone, a chunk of them at a time: the logits of a batch
never exist. Programs depend on the model's config, the width and the number of rows, and are kept
as long as the process lives, whatever weights are scored.

On a mesh the rows of a batch are cut over its devices. Several processes must all score the same
requests; all of them get all results.
"""

import copy
import dataclasses
import functools
import math
from collections import deque
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from pythia_jax import sharding
from pythia_jax.bridge.model import Model
from pythia_jax.configs import MeshConfig, ModelConfig, Runtime
from pythia_jax.evaluation import packing
from pythia_jax.evaluation.packing import Batch, Request
from pythia_jax.model import generation, parameters, quantize
from pythia_jax.model.attention import exact
from pythia_jax.model.generation import CHECKED_STEPS
from pythia_jax.model.gptneox import hidden_states
from pythia_jax.model.parameters import Params
from pythia_jax.model.quantize import Quantized
from pythia_jax.model.sampling import Sampling, likeliest
from pythia_jax.model.serving import MOST_STEPS, Row, serve

AHEAD = 2
"""Batches under way before the results of the oldest are waited for."""


class Scorer:
    """Scores with one set of weights, on the mesh around it or else on all devices."""

    def __init__(
        self,
        model: Model,
        *,
        batch_tokens: int | None = None,
        batch_rows: int | None = None,
        max_length: int | None = None,
        runtime: Runtime = Runtime(),
    ) -> None:
        """
        batch_tokens: tokens of a batch, padding included; None is 2048 on a CPU and 16384 for each
            device elsewhere. batch_rows: or rows of a batch, whatever their length.
        max_length: tokens that the model is given at most; None is as many as it has positions.

        Raises ValueError for numbers that cannot be, ConfigError where the mesh cannot cut the
        model.
        """
        self.runtime = runtime
        self.mesh = _mesh()
        sharding.check_fit(self.mesh, model.config, self.shards)
        positions = model.config.max_position_embeddings
        self.max_length = positions if max_length is None else max_length
        if not 1 <= self.max_length <= positions:
            raise ValueError(
                f"max_length {max_length}: the model has {positions} positions; give 1 to "
                f"{positions}"
            )
        for name, value in (("batch_tokens", batch_tokens), ("batch_rows", batch_rows)):
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: it must be at least 1")
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        self.batch_rows = batch_rows
        self.batch_tokens = batch_tokens or (2048 if on_cpu else 16384 * self.shards)
        self.chunk = 64 if on_cpu else 512
        self.model = dataclasses.replace(model, params=self._placed(model.params))

    @property
    def params(self) -> Params:
        return self.model.params

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def shards(self) -> int:
        """Parts that the rows of a batch are cut into."""
        return math.prod(self.mesh.shape[axis] for axis in sharding.ROWS)

    def replace(self, params: Params) -> "Scorer":
        """One with other weights of this config: nothing is compiled again.

        Raises ValueError for weights of other shapes or dtypes.
        """
        pairs = zip(parameters.items(params), parameters.items(self.params), strict=True)
        for (parameter, new), (_, old) in pairs:
            if _kind(new) != _kind(old):
                raise ValueError(
                    f"{parameter.path} is {_kind(new)}, where the model scored so far has "
                    f"{_kind(old)}; make a Scorer of its own for it"
                )
        other = copy.copy(self)
        other.model = dataclasses.replace(self.model, params=self._placed(params))
        return other

    def _placed(self, params: Params) -> Params:
        """The parameters where the rules say; what lies there already is not copied.

        By the very same description of where that is: to `jax.jit` another one, though it means the
        same, is another program.
        """
        return jax.device_put(params, quantize.shardings(params, self.mesh))

    def loglikelihoods(
        self, requests: Sequence[Request], progress: bool = False
    ) -> list[tuple[float, bool]]:
        """Of each continuation given its context: its log-probability, and whether it is greedy.

        requests: pairs (tokens of the context, tokens of the continuation). Where both together
            are longer than the model takes (max_length and one more), the context is cut from the
            left. progress: show a bar.

        Returns pairs: log-probabilities in nats, summed over the continuation's tokens; whether
        each of these is the likeliest in its place.

        Raises ValueError for an empty context or continuation, a continuation longer than
        max_length, and a token that is not in the vocabulary.
        """
        for i, request in enumerate(requests):
            self._check(i, *request)
        rows = packing.shared(requests, self.max_length)
        answers: list = [None] * len(requests)
        waiting: deque[tuple[Batch, jax.Array, jax.Array]] = deque()
        bar = tqdm(total=len(requests), disable=not progress, unit="request")

        def collect() -> None:
            batch, log_probabilities, best = waiting.popleft()
            done = batch.answers(np.asarray(log_probabilities), np.asarray(best))
            for request, answer in done:
                answers[request] = answer
            bar.update(len(done))

        with bar, jax.set_mesh(self.mesh):
            for batch in packing.batches(
                rows, requests, self._rows_of, self.shards, self.config.max_position_embeddings
            ):
                waiting.append((batch, *self._run(batch)))
                if len(waiting) > AHEAD:
                    collect()
            while waiting:
                collect()
        return answers

    def _check(self, i: int, context: Sequence[int], continuation: Sequence[int]) -> None:
        if not len(context) or not len(continuation):
            what = "continuation" if len(context) else "context"
            raise ValueError(f"request {i}: its {what} is empty; give at least one token of each")
        if len(continuation) > self.max_length:
            raise ValueError(
                f"request {i}: a continuation of {len(continuation)} tokens is longer than the "
                f"{self.max_length} that the model is given"
            )
        top, bottom = max(*context, *continuation), min(*context, *continuation)
        if bottom < 0 or top >= self.config.vocab_size:
            raise ValueError(
                f"request {i}: token {bottom if bottom < 0 else top} is not in the vocabulary of "
                f"{self.config.vocab_size}"
            )

    def _rows_of(self, width: int) -> int:
        """Rows of a batch of that width: a multiple of `shards`."""
        shards = self.shards
        if self.batch_rows is not None:
            return -(-self.batch_rows // shards) * shards
        return max(1, self.batch_tokens // width // shards) * shards

    def _run(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        def placed(value: np.ndarray, *axes: str) -> jax.Array:
            place = sharding.sharding(self.mesh, axes)
            return jax.make_array_from_callback(value.shape, place, lambda index: value[index])

        return _score(
            self.params,
            placed(batch.tokens, "batch", "seq"),
            placed(batch.slots, "batch", "seq"),
            placed(batch.targets, "batch", "seq", "seq"),
            np.int32(-(-batch.used // self.chunk)),
            config=self.config,
            runtime=self.runtime,
            chunk=min(self.chunk, batch.slots.shape[1]),
        )

    def greedy(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        stop_at_eod: bool = True,
        finished: Callable[[list[int]], bool] | None = None,
        progress: bool = False,
    ) -> list[list[int]]:
        """The likeliest next tokens of each prompt, one after the other.

        stop_at_eod: end a row with its first end-of-document token, which is returned. finished:
            asked every few tokens whether a row's new tokens are enough; a row may get more.

        Raises ValueError for an empty prompt, and one that does not fit the context together with
        max_new_tokens.
        """
        generation.check_prompts(prompts, self.config, max_new_tokens)
        new: list[list[int]] = [[] for _ in prompts]
        if not prompts:
            return new

        def look(row: Row) -> None:
            if row.ended is None and finished is not None and finished(row.tokens):
                row.ended = "stop"

        longest = max(map(len, prompts)) + max_new_tokens
        bar = tqdm(total=len(prompts), disable=not progress, unit="prompt")
        with bar, jax.set_mesh(self.mesh):
            rows = serve(
                self.params,
                self.config,
                [Row(i, prompt) for i, prompt in enumerate(prompts)],
                Sampling(),
                max_new_tokens=max_new_tokens,
                eod=self.model.eod if stop_at_eod else -1,
                batch_size=self._rows_of(longest),
                runtime=self.runtime,
                steps=MOST_STEPS if finished is None else CHECKED_STEPS,
                look=look,
            )
            for row in rows:
                new[row.index] = row.tokens
                bar.update()
        return new


def _kind(value: jax.Array | Quantized) -> str:
    """What of a parameter decides the program that reads it, in words."""
    if not isinstance(value, Quantized):
        return f"{value.dtype}{list(value.shape)}"
    activations = "int8" if value.dynamic else value.dtype
    return f"int8{list(value.values.shape)} with activations in {activations}"


def _mesh() -> Mesh:
    """The mesh around us, or one of all devices as training would lay it out."""
    mesh = jax.sharding.get_mesh()
    return sharding.make_mesh(MeshConfig()) if mesh.empty else mesh


@functools.partial(jax.jit, static_argnames=("config", "runtime", "chunk"))
def _score(
    params: Params,
    tokens: Int[Array, "rows width"],
    slots: Int[Array, "shards capacity"],
    targets: Int[Array, "shards capacity ways"],
    chunks: Int[Array, ""],
    *,
    config: ModelConfig,
    runtime: Runtime,
    chunk: int,
) -> tuple[Float[Array, "shards capacity ways"], Int[Array, "shards capacity"]]:
    """Log-probabilities of targets in the first `chunks` chunks of slots, and the likeliest tokens.

    How many chunks there are is no part of the program's shape: it is the trip count of a loop.
    """
    hidden, _ = hidden_states(params, tokens, config, runtime=runtime)
    axes = ("batch", "seq", "stream")
    hidden = sharding.constrain(hidden.reshape(slots.shape[0], -1, hidden.shape[-1]), axes)
    # Gathered once, before the loop; left to the compiler, in every round of it.
    hidden, kernel = quantize.in_floats(hidden, params["embed_out"]["kernel"])
    kernel = sharding.constrain(kernel.astype(hidden.dtype), ("stream", "vocab"))
    wide = jnp.promote_types(hidden.dtype, jnp.float32)

    def score(i: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        log_probabilities, best = found
        # The last chunk may begin earlier, to end with the array; it then repeats some slots.
        start = jnp.minimum(i * chunk, slots.shape[1] - chunk)
        at = jax.lax.dynamic_slice_in_dim(slots, start, chunk, 1)
        wanted = jax.lax.dynamic_slice_in_dim(targets, start, chunk, 1)
        x = jnp.take_along_axis(hidden, at[..., None], axis=1)
        logits = jnp.einsum(
            "sch,hv->scv", x, kernel, precision=exact(x), preferred_element_type=wide
        )
        logits = sharding.constrain(logits, ("batch", "seq", "vocab"))
        peak = logits.max(axis=-1, keepdims=True)
        total = jnp.log(jnp.exp(logits - peak).sum(axis=-1, keepdims=True))
        chosen = jnp.take_along_axis(logits, wanted, axis=-1) - peak - total
        put = jax.lax.dynamic_update_slice_in_dim
        return put(log_probabilities, chosen, start, 1), put(best, likeliest(logits), start, 1)

    empty = (jnp.zeros(targets.shape, wide), jnp.zeros(slots.shape, jnp.int32))
    found = jax.lax.fori_loop(0, chunks, score, empty)
    if sharding.current() is not None:  # to every device, and so to every process
        found = jax.lax.with_sharding_constraint(found, PartitionSpec())
    return found
