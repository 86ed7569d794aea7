"""The table of parameters: every array of the model, once.

Initialisation, sharding, the weight-decay mask, parameter counts and the conversions to Hugging
Face and GPT-NeoX are all read off `TABLE`. Adding a parameter is adding a line.

Parameters are a plain nested dict; those of the layers are stacked on a leading axis.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh
from jax.typing import DTypeLike

from pythia_jax import sharding
from pythia_jax.configs import ModelConfig

Params = dict
"""A nested dict of arrays, shaped as `TABLE` says."""

_WIDTH: dict[str, Callable[[ModelConfig], int]] = {
    "layers": lambda c: c.num_hidden_layers,
    "vocab": lambda c: c.vocab_size,
    "hidden": lambda c: c.hidden_size,
    "stream": lambda c: c.hidden_size,
    "qkv": lambda c: 3 * c.hidden_size,
    "heads": lambda c: c.hidden_size,
    "mlp": lambda c: c.intermediate_size,
}
"""Size of each logical axis. `qkv` runs over heads, within a head over query, key, value.
`stream` is the hidden axis of vectors, which are too small to be worth cutting."""


@dataclass(frozen=True)
class Parameter:
    """One array of the model.

    path: where it stands in the tree. axes: the logical name of each axis. init: `input` and
    `output` are the two normal distributions of the initialiser, else a constant. hf, neox: the
    name of one layer's tensor in Hugging Face's and in GPT-NeoX's checkpoints, `{layer}` left
    open; GPT-NeoX's begin with the place in its pipeline (`hf_names`, `neox_names`).
    A `kernel` lies (in, out), a torch weight (out, in).
    """

    path: str
    axes: tuple[str, ...]
    init: Literal["input", "output", "zeros", "ones"]
    hf: str
    neox: str

    @property
    def stacked(self) -> bool:
        return self.axes[0] == "layers"

    @property
    def transposed(self) -> bool:
        """Whether torch holds it the other way round."""
        return self.path.endswith("/kernel")

    @property
    def decayed(self) -> bool:
        """GPT-NeoX decays all but norms and biases (model/utils.py); embeddings are decayed."""
        return self.init in ("input", "output")

    @property
    def summed(self) -> bool:
        """Whether every model-parallel rank of GPT-NeoX adds a copy of its own: biases of layers
        cut along their input, whose sum is the bias (gpt-neox#962)."""
        return self.path in ("layers/attention/dense/bias", "layers/mlp/dense_4h_to_h/bias")

    @property
    def int8(self) -> tuple["Parameter", "Parameter"]:
        """The axes of a matrix's values and scales where it is a `Quantized`: of a kernel, the
        output channels before the input's."""
        *layers, rows, columns = self.axes
        turned = (columns, rows) if self.transposed else (rows, columns)
        return replace(self, axes=(*layers, *turned)), replace(self, axes=(*layers, turned[0]))

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        return tuple(_WIDTH[axis](config) for axis in self.axes)

    def hf_names(self, config: ModelConfig) -> list[str]:
        """Its tensors' names at Hugging Face, one a layer where it is stacked."""
        layers = range(config.num_hidden_layers) if self.stacked else range(1)
        return [self.hf.format(layer=layer) for layer in layers]

    def neox_names(self, config: ModelConfig) -> list[str]:
        """Its tensors' names in GPT-NeoX's pipeline, one a layer where it is stacked.

        Places 1 and L + 2 of the pipeline are functions without parameters.
        """
        depth = config.num_hidden_layers
        layers = range(depth) if self.stacked else range(1)
        return [self.neox.format(layer=i + 2, norm=depth + 3, out=depth + 4) for i in layers]


def _layer(path: str, axes: tuple[str, ...], init: str, torch_name: str) -> Parameter:
    return Parameter(
        f"layers/{path}",
        ("layers", *axes),
        init,  # type: ignore[arg-type]
        f"gpt_neox.layers.{{layer}}.{torch_name}",
        f"{{layer}}.{torch_name}",
    )


TABLE: tuple[Parameter, ...] = (
    Parameter(
        "embed_in/embedding",
        ("vocab", "hidden"),
        "input",
        "gpt_neox.embed_in.weight",
        "0.word_embeddings.weight",
    ),
    _layer("input_layernorm/scale", ("stream",), "ones", "input_layernorm.weight"),
    _layer("input_layernorm/bias", ("stream",), "zeros", "input_layernorm.bias"),
    _layer(
        "post_attention_layernorm/scale", ("stream",), "ones", "post_attention_layernorm.weight"
    ),
    _layer("post_attention_layernorm/bias", ("stream",), "zeros", "post_attention_layernorm.bias"),
    _layer(
        "attention/query_key_value/kernel",
        ("hidden", "qkv"),
        "input",
        "attention.query_key_value.weight",
    ),
    _layer("attention/query_key_value/bias", ("qkv",), "zeros", "attention.query_key_value.bias"),
    _layer("attention/dense/kernel", ("heads", "hidden"), "output", "attention.dense.weight"),
    _layer("attention/dense/bias", ("stream",), "zeros", "attention.dense.bias"),
    _layer("mlp/dense_h_to_4h/kernel", ("hidden", "mlp"), "input", "mlp.dense_h_to_4h.weight"),
    _layer("mlp/dense_h_to_4h/bias", ("mlp",), "zeros", "mlp.dense_h_to_4h.bias"),
    _layer("mlp/dense_4h_to_h/kernel", ("mlp", "hidden"), "output", "mlp.dense_4h_to_h.weight"),
    _layer("mlp/dense_4h_to_h/bias", ("stream",), "zeros", "mlp.dense_4h_to_h.bias"),
    Parameter(
        "final_layer_norm/scale",
        ("stream",),
        "ones",
        "gpt_neox.final_layer_norm.weight",
        "{norm}.norm.weight",
    ),
    Parameter(
        "final_layer_norm/bias",
        ("stream",),
        "zeros",
        "gpt_neox.final_layer_norm.bias",
        "{norm}.norm.bias",
    ),
    Parameter(
        "embed_out/kernel",
        ("hidden", "vocab"),
        "input",
        "embed_out.weight",
        "{out}.final_linear.weight",
    ),
)


def tree(leaf: Callable[[Parameter], object]) -> dict:
    """The tree of parameters with `leaf(parameter)` in each place."""
    return traverse_util.unflatten_dict({p.path: leaf(p) for p in TABLE}, sep="/")


def items(params: Params) -> Iterator[tuple[Parameter, Any]]:
    """Each parameter's row of the table beside its array."""
    flat = traverse_util.flatten_dict(params, sep="/")
    for parameter in TABLE:
        yield parameter, flat[parameter.path]


def map_parameters(f: Callable[..., Any], params: Params, *rest: Params) -> Params:
    """The tree of `f(parameter, value, …)`, a row of the table beside its place in each tree."""
    flat = [traverse_util.flatten_dict(part, sep="/") for part in (params, *rest)]
    return tree(lambda p: f(p, *(values[p.path] for values in flat)))


def abstract(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> Params:
    """Shapes and dtypes of the parameters; no memory is taken."""
    return tree(lambda p: jax.ShapeDtypeStruct(p.shape(config), dtype))


def shardings(mesh: Mesh) -> Params:
    """Where each parameter lies on a mesh."""
    return tree(lambda p: sharding.sharding(mesh, p.axes))


def decay_mask() -> Params:
    """True where weight decay applies."""
    return tree(lambda p: p.decayed)


def count(config: ModelConfig, *, embedding: bool = True) -> int:
    """Number of parameters; without the two embeddings if `embedding` is false."""
    return sum(
        math.prod(p.shape(config)) for p in TABLE if embedding or not p.path.startswith("embed_")
    )


def standard_deviations(config: ModelConfig) -> dict[str, float]:
    """Standard deviations of the `input` and `output` distributions.

    GPT-NeoX v1.0's init_functions.py: small_init (Nguyen and Salazar, 2019) with wang_init for
    `small_wang`; normal and scaled_normal (Radford et al., 2019) for `normal_scaled`.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    if config.initializer == "small_wang":
        return {"input": math.sqrt(2 / (5 * hidden)), "output": 2 / (layers * math.sqrt(hidden))}
    return {"input": 0.02, "output": 0.02 / math.sqrt(2 * layers)}


def init_parameters(config: ModelConfig, key: jax.Array, dtype: DTypeLike = jnp.float32) -> Params:
    """Fresh parameters: normal kernels and embeddings, zero biases, unit norm scales.

    key: a JAX random key. Each parameter draws from its own key, made from its place in the
    table, so that adding one does not change the others.
    """
    deviations = standard_deviations(config)

    def draw(parameter: Parameter) -> jax.Array:
        shape = parameter.shape(config)
        if parameter.init == "zeros":
            return jnp.zeros(shape, dtype)
        if parameter.init == "ones":
            return jnp.ones(shape, dtype)
        own = jax.random.fold_in(key, TABLE.index(parameter))
        return deviations[parameter.init] * jax.random.normal(own, shape, dtype)

    return tree(draw)
