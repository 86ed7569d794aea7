"""What half-precision rotary angles cost an export, measured.

Pythia was trained with rotary angles in half precision. A Hugging Face model always takes float32
ones, so a model trained the first way computes another function once it is exported. How far
apart the two are is measured here, for a warning and for the model card.
"""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from pythia_jax.bridge.opened import Opened
from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.model import attention, parameters
from pythia_jax.model.gptneox import block, embed, layer_norm, unembed
from pythia_jax.model.parameters import Params
from pythia_jax.model.sites import Hooks

POSITIONS = 256
"""Of the context, the last ones: half-precision angles are coarser the farther out."""
ROWS = 2


@dataclass(frozen=True)
class Difference:
    """Between the function that was trained and the exported one, over the same tokens.

    largest_logit: the largest absolute difference of any logit. kl: the mean over all positions of
    KL(trained ‖ exported), in nats. first, last: the positions that the tokens stood at.
    """

    precision: str
    largest_logit: float
    kl: float
    rows: int
    first: int
    last: int

    def in_words(self) -> str:
        return (
            f"trained with rotary angles in {self.precision}, which transformers cannot express: "
            f"it computes them in float32. Measured on {self.rows} rows of random tokens at "
            f"positions {self.first} to {self.last}, the exported function's logits differ by up "
            f"to {self.largest_logit:.3g}, and its predictions by {self.kl:.3g} nats a token "
            "(mean KL divergence)"
        )


def measure(opened: Opened) -> Difference | None:
    """The difference that exporting makes; None for a model with float32 angles.

    Computed in float32 on fixed random tokens, with one layer's weights in memory.
    """
    trained = opened.config
    if trained.rotary_precision == "float32":
        return None
    ways = (trained, replace(trained, rotary_precision="float32"))
    last = trained.max_position_embeddings
    first = max(0, last - POSITIONS)
    # On a mesh every device has rows of its own.
    rows = ROWS * max(1, jax.sharding.get_mesh().size)
    shape = (rows, last - first)
    tokens = np.random.default_rng(0).integers(0, trained.vocab_size, shape).astype(np.int32)
    x = embed(_params(opened, "embed_in"), tokens)
    streams = [x, x]
    for layer in range(trained.num_hidden_layers):
        weights = _params(opened, "layers", layer)
        streams = [_layer(weights, x, c, first) for x, c in zip(streams, ways, strict=True)]
    norm = _params(opened, "final_layer_norm")["final_layer_norm"]
    head = _params(opened, "embed_out")
    largest, divergence = 0.0, 0.0
    for row in range(rows):
        logits = [unembed(head, layer_norm(x[row], norm, trained.layer_norm_eps)) for x in streams]
        p, q = (jax.nn.log_softmax(x) for x in logits)
        largest = max(largest, float(jnp.abs(logits[0] - logits[1]).max()))
        # Both sum to 1, so this is the KL divergence, and no term of it is negative: the plain
        # sum of p log(p / q) would lose a small one to rounding.
        terms = jnp.exp(p) * (jnp.expm1(q - p) - (q - p))
        divergence += float(terms.sum(axis=-1).mean()) / rows
    return Difference(trained.rotary_precision, largest, divergence, rows, first, last - 1)


def _params(opened: Opened, part: str, layer: int = 0) -> Params:
    """A part of the tree of parameters, of one layer, in float32."""

    def leaf(parameter: parameters.Parameter) -> jax.Array | None:
        if parameter.path.partition("/")[0] != part:
            return None
        return jnp.asarray(opened.read(parameter, layer), jnp.float32)

    tree = parameters.tree(leaf)
    return tree["layers"] if part == "layers" else tree


@functools.partial(jax.jit, static_argnames=("config", "first"))
def _layer(weights: Params, x: jax.Array, config: ModelConfig, first: int) -> jax.Array:
    """One layer on rows whose first token stands at position `first`."""
    positions = np.arange(first, first + x.shape[1])
    hooks = Hooks((), None, None, config, *x.shape[:2]).at()
    kernel = attention.choose(Runtime(), ())

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k = (attention.rotate(x, positions, config) for x in (q, k))
        return attention.attend(q, k, v, kernel, hooks)

    return block(weights, x, config, attend, hooks)
