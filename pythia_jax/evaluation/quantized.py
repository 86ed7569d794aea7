"""What a model loses in int8: errors of its weights and outputs, perplexity before and after, size.

The checkpoint is read a layer at a time. A text runs through both models layer by layer, so that in
memory are one layer of each and the residual streams of the text.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from pythia_jax import data
from pythia_jax.bridge.int8 import BITS, Scheme, rounded_matrix
from pythia_jax.bridge.model import eod_of, tokenizer_of
from pythia_jax.bridge.opened import Opened
from pythia_jax.bridge.quantize import Activations, open_floats, scheme_of
from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.files import write_whole
from pythia_jax.model import attention, quantize
from pythia_jax.model.gptneox import block, check_tokens, dense, embed, layer_norm, unembed
from pythia_jax.model.parameters import TABLE, Params
from pythia_jax.model.quantize import Quantized
from pythia_jax.model.sites import Hooks

FILE = "quantization.json"
"""The report, in the folder of the model that it is of."""
TOKENS = 1 << 14
"""Of a text at most: streams of more would take more memory than the weights of a large layer."""
_TOGETHER = 2048
"""Tokens at once through a layer."""
_LOGITS = 256
"""Tokens whose logits exist at once."""
_MATRICES = (
    "attention/query_key_value",
    "attention/dense",
    "mlp/dense_h_to_4h",
    "mlp/dense_4h_to_h",
)
_READ = ("mlp_in", "attn.z", "mlp.post")

Squares = dict[str, tuple[Array, Array]]
"""By module: the sums of squares of an error, and of what it is of."""


@dataclass(frozen=True)
class OnText:
    """What a text shows. outputs: relative errors of the modules' outputs, as `Report.weights`.

    Each module is given the inputs that it has in the float model, so that its error is its own;
    logits and perplexity are those of the int8 model from the first layer on. Of logits the mean
    at each position, which no prediction depends on, is left out.
    """

    tokens: int
    perplexity_before: float
    perplexity_after: float
    logits: float
    outputs: dict[str, list[float]]


@dataclass(frozen=True)
class Report:
    """What rounding does to a checkpoint.

    how: what is rounded, in words. weights: by module, one number a layer, the Frobenius norm of
    the error over that of the matrix. bytes_in: of the tensors, in each dtype.
    """

    source: str
    how: str
    weights: dict[str, list[float]]
    bytes_in: dict[str, int]
    text: OnText | None = field(default=None)

    def table(self) -> str:
        """It for a terminal, errors in percent."""
        what = "weights" if self.text is None else "weights / outputs"
        names = [name for name in _MATRICES if name in self.weights]
        rows = [(f"{what}, % off", *names)]
        for layer in range(len(self.weights[names[0]])):
            rows.append((f"layer {layer}", *(self._cell(name, layer) for name in names)))
        for name in ("embed_in", "embed_out"):
            if name in self.weights:
                rows.append((name, self._cell(name, 0)))
        widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=False))
            for row in rows
        ]
        lines += ["", f"{self.source}: {self.how}"]
        if self.text is not None:
            before, after = self.text.perplexity_before, self.text.perplexity_after
            lines += [
                f"perplexity  {before:.4f} -> {after:.4f} ({after / before - 1:+.3%}), "
                f"on {self.text.tokens:,} tokens",
                f"logits      {self.text.logits:.3%} off",
            ]
        own = self.bytes_in["int8"]
        others = ", ".join(
            f"{own / count:.4f} of {dtype}'s {count:,}"
            for dtype, count in self.bytes_in.items()
            if dtype != "int8"
        )
        return "\n".join([*lines, f"size        {own:,} bytes: {others}"])

    def _cell(self, name: str, layer: int) -> str:
        cell = f"{100 * self.weights[name][layer]:.3f}"
        return cell if self.text is None else f"{cell} / {100 * self.text.outputs[name][layer]:.3f}"

    def save(self, folder: Path) -> None:
        """Write it as JSON into the folder of the model in int8."""
        text = None if self.text is None else vars(self.text)
        content = {**vars(self), "text": text}
        write_whole(folder / FILE, (json.dumps(content, indent=2) + "\n").encode())


def report(
    source: str | os.PathLike[str],
    *,
    text: Path | None = None,
    prefix: str | None = None,
    bits: int = BITS,
    activations: Activations = "float",
    keep_embeddings: bool = False,
    dtype: str | None = None,
    revision: str | None = None,
    step: int | None = None,
    show_progress: bool = True,
) -> Report:
    """What `bridge.quantize.quantize` with the same arguments would lose, computed in float32.

    text: a file or folder of texts (`data.read_texts`), for the model's own tokenizer. prefix: or a
    dataset's, tokens already. Of either the first `TOKENS` are taken.

    Raises as `quantize` does, and ValueError for a text that is too short or of other tokens.
    """
    scheme = scheme_of(bits, activations, keep_embeddings)
    opened = open_floats(source, revision=revision, step=step)
    rows = [] if text is None and prefix is None else rows_of(opened, text, prefix)
    measured = _Measured(opened, scheme, dtype)
    total = opened.config.num_hidden_layers + 2
    with tqdm(total=total, unit=" parts", desc="comparing", disable=not show_progress) as bar:
        for _ in measured.run(rows):
            bar.update()
    return Report(
        opened.source,
        scheme.in_words(),
        measured.weights,
        sizes(opened, scheme, dtype or opened.stored_dtype),
        measured.on_text(rows) if rows else None,
    )


def rows_of(
    opened: Opened, text: Path | None, prefix: str | None
) -> list[Int[np.ndarray, "rows seq+1"]]:
    """The first tokens of a text or a dataset, in rows as long as the context allows.

    What is left over is a shorter row, in an array of its own. A row begins with the last token of
    the one before; a document of a text ends with `<|endoftext|>`. Raises ValueError for one too
    short, for other tokens, and where there is no tokenizer.
    """
    if text is not None and prefix is not None:
        raise ValueError(f"text (--text) {text} and data (--data) {prefix}: give one of them")
    if text is None:
        assert prefix is not None
        dataset = data.open(prefix)
        count = min(dataset.num_tokens, TOKENS + 1)
        tokens = dataset.read_spans(np.array([0]), np.array([count])).astype(np.int32)
    else:
        tokens = np.array(_encoded(opened, text), np.int32)
    length = min(opened.config.max_position_embeddings, len(tokens) - 1)
    if length < 1:
        raise ValueError(f"{text or prefix}: holds no two tokens, so there is nothing to predict")
    check_tokens(tokens[None], opened.config)
    count, left = divmod(len(tokens) - 1, length)
    starts = length * np.arange(count)
    rows = [tokens[starts[:, None] + np.arange(length + 1)]]
    return [*rows, tokens[None, -1 - left :]] if left else rows


def _encoded(opened: Opened, text: Path) -> list[int]:
    tokenizer = tokenizer_of(opened.tokenizer_files)
    if tokenizer is None:
        raise ValueError(
            f"{opened.source}: has no tokenizer, so text (--text) cannot be read; give the prefix "
            "of a dataset (--data)"
        )
    eod, ids = eod_of(opened.tokenizer_files), []
    for document in data.read_texts(text):
        ids += [*tokenizer.encode(document).ids, eod]
        if len(ids) > TOKENS:
            break
    return ids[: TOKENS + 1]


def sizes(opened: Opened, scheme: Scheme, dtype: str) -> dict[str, int]:
    """Bytes of all tensors: in int8, what stays in floats in `dtype`, and in floats altogether."""
    total = rounded = scales = 0
    for parameter in TABLE:
        count = math.prod(parameter.shape(opened.config))
        total += count
        if scheme.covers(parameter):
            rounded += count
            scales += math.prod(parameter.int8[1].shape(opened.config))
    width = jnp.dtype(dtype).itemsize
    own = rounded + 4 * scales + width * (total - rounded)
    return {"int8": own, "float16": 2 * total, "float32": 4 * total}


class _Measured:
    """Both models side by side, one part of them after the other."""

    def __init__(self, opened: Opened, scheme: Scheme, dtype: str | None) -> None:
        self._opened, self._scheme, self._dtype = opened, scheme, dtype
        self.weights: dict[str, list[float]] = {}
        self._outputs: dict[str, list[float]] = {}
        self._logits = np.zeros(2)
        self._losses = np.zeros(2)

    def run(self, rows: list[Int[np.ndarray, "rows seq+1"]]) -> Iterator[None]:
        """Compare the parts, from the embedding to the unembedding; yields after each.

        rows: `rows_of` a text; of none, the weights alone are compared.
        """
        config = self._opened.config
        batches = [batch for some in rows for batch in _batches(some)]
        models = self._both("embed_in")
        streams = [[embed(model, batch[:, :-1]) for model in models] for batch in batches]
        self._add([{"embed_in": _squares(x, y)} for x, y in streams])
        yield
        for layer in range(config.num_hidden_layers):
            models = self._both("layers", layer)
            found = []
            for i, (x, y) in enumerate(streams):
                streams[i], squares = _layer(*models, x, y, config)
                found.append(squares)
            self._add(found)
            yield
        (norm, _), models = self._both("final_layer_norm"), self._both("embed_out")
        found = []
        for (x, y), batch in zip(streams, batches, strict=True):
            for chunk in _chunks(x, y, batch[:, 1:]):
                losses, squares = _last(norm, *models, *chunk, config)
                self._losses += np.array(losses, np.float64)
                self._logits += np.array(squares.pop("logits"), np.float64)
                found.append(squares)
        self._add(found)
        yield

    def on_text(self, rows: list[Int[np.ndarray, "rows seq+1"]]) -> OnText:
        """What `run` has found of these rows."""
        count = sum(some[:, 1:].size for some in rows)
        before, after = (math.exp(loss / count) for loss in self._losses)
        return OnText(count, before, after, _relative(self._logits), self._outputs)

    def _add(self, found: list[Squares]) -> None:
        """Errors of the outputs of modules, over all batches."""
        for name in found[0] if found else ():
            total = sum(np.array(squares[name], np.float64) for squares in found)
            self._outputs.setdefault(name, []).append(_relative(total))

    def _both(self, part: str, layer: int = 0) -> tuple[Params, Params]:
        """A part of the tree, or a layer of it, in floats and in int8; notes how they differ."""
        floats, rounded = {}, {}
        for parameter in TABLE:
            if parameter.path.partition("/")[0] != part:
                continue
            path = parameter.path.removeprefix("layers/")
            value = self._opened.read(parameter, layer)
            floats[path] = jnp.asarray(value, jnp.float32)
            rounded[path] = floats[path].astype(self._dtype or jnp.float32).astype(jnp.float32)
            if self._scheme.covers(parameter):
                turned = value.T if parameter.transposed else value
                matrix = rounded_matrix(parameter.hf.format(layer=layer), turned)
                rounded[path] = Quantized(*map(jnp.asarray, matrix), dynamic=self._scheme.dynamic)
            if path.endswith(("kernel", "embedding")):
                module = path.rpartition("/")[0]
                error = _relative(_weight_squares(floats[path], rounded[path]))
                self.weights.setdefault(module, []).append(error)
        return _tree(floats), _tree(rounded)


def _tree(flat: dict[str, Any]) -> Params:
    return traverse_util.unflatten_dict(flat, sep="/")


def _relative(squares: Any) -> float:
    error, norm = (float(value) for value in squares)
    return math.sqrt(error / norm) if norm else 0.0


def _squares(x: Array, y: Array) -> tuple[Array, Array]:
    return jnp.square(x - y).sum(), jnp.square(x).sum()


@jax.jit
def _weight_squares(matrix: Array, rounded: Array | Quantized) -> tuple[Array, Array]:
    if isinstance(rounded, Quantized):
        turned = quantize.kernel(rounded)
        rounded = turned if turned.shape == matrix.shape else turned.mT
    return _squares(matrix, rounded)


@partial(jax.jit, static_argnames="config", donate_argnums=(2, 3))
def _layer(
    floats: Params,
    rounded: Params,
    x: Float[Array, "batch seq hidden"],
    y: Float[Array, "batch seq hidden"],
    config: ModelConfig,
) -> tuple[list, Squares]:
    """A layer of each model on its own stream; and each module of both on the float model's."""
    positions = np.arange(x.shape[1])
    kernel = attention.choose(Runtime(), ())

    def run(weights: Params, stream: Array, capture: tuple) -> tuple[Array, dict]:
        hooks = Hooks(capture, None, None, config, *stream.shape[:2]).at()

        def attend(q: Array, k: Array, v: Array) -> Array:
            q, k = (attention.rotate(a, positions, config) for a in (q, k))
            return attention.attend(q, k, v, kernel, hooks)

        return block(weights, stream, config, attend, hooks), hooks.captured

    after, read = run(floats, x, _READ)
    eps = config.layer_norm_eps
    inputs = (
        layer_norm(x, floats["input_layernorm"], eps),
        read["attn.z"].reshape(x.shape),
        layer_norm(read["mlp_in"], floats["post_attention_layernorm"], eps),
        read["mlp.post"],
    )
    found = {}
    for name, value in zip(_MATRICES, inputs, strict=True):
        # Without the bias, which is exact in both.
        room, module = name.split("/")
        pair = [dense(value, {"kernel": m[room][module]["kernel"], "bias": 0.0})
                for m in (floats, rounded)]  # fmt: skip
        found[name] = _squares(*pair)
    return [after, run(rounded, y, ())[0]], found


def _batches(rows: Int[np.ndarray, "rows seq+1"]) -> list[Int[np.ndarray, "some seq+1"]]:
    size = max(1, _TOGETHER // (rows.shape[1] - 1))
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _chunks(
    x: Float[Array, "batch seq hidden"],
    y: Float[Array, "batch seq hidden"],
    labels: Int[np.ndarray, "batch seq"],
) -> Iterator[tuple]:
    flat = [stream.reshape(-1, stream.shape[-1]) for stream in (x, y)]
    for first in range(0, labels.size, _LOGITS):
        part = slice(first, first + _LOGITS)
        yield flat[0][part], flat[1][part], labels.reshape(-1)[part]


@partial(jax.jit, static_argnames="config")
def _last(
    norm: Params,
    floats: Params,
    rounded: Params,
    x: Float[Array, "rows hidden"],
    y: Float[Array, "rows hidden"],
    labels: Int[Array, " rows"],
    config: ModelConfig,
) -> tuple[Float[Array, "2"], Squares]:
    """Summed losses of both models, in nats, and errors of the unembedding and of the logits."""
    weights, eps = norm["final_layer_norm"], config.layer_norm_eps
    hidden, other = (layer_norm(stream, weights, eps) for stream in (x, y))
    logits, after = unembed(floats, hidden), unembed(rounded, other)
    losses = [-jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], 1).sum()
              for z in (logits, after)]  # fmt: skip
    centred = [z - z.mean(axis=-1, keepdims=True) for z in (logits, after)]
    return jnp.stack(losses), {
        "embed_out": _squares(logits, unembed(rounded, hidden)),
        "logits": _squares(*centred),
    }
