"""`Opened`: a checkpoint of any kind, its config known, its tensors read one at a time.

Every reader (Hugging Face, GPT-NeoX, our run folders) makes one, and every writer takes one: so
any kind converts to any other, with one layer of one parameter in memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pythia_jax import sharding
from pythia_jax.bridge.model import Model
from pythia_jax.configs import ModelConfig
from pythia_jax.model import parameters
from pythia_jax.model.parameters import Parameter, Params
from pythia_jax.model.quantize import Quantized
from pythia_jax.training.streamed import by_layer


class CheckpointError(ValueError):
    """Weights that are missing, misshapen or unreadable: the message names them all."""


@dataclass(frozen=True, eq=False)
class Int8:
    """The matrices of a checkpoint that are stored in int8.

    paths: theirs in the tree. dynamic: whether activations are to be rounded too. values, scale:
        `values(parameter, layer)` and `scale(parameter, layer)` are one layer's, int8 `[out, in]`
        and float `[out]`, of which `Opened.read` gives the product.
    """

    paths: frozenset[str]
    dynamic: bool
    values: Callable[[Parameter, int], np.ndarray]
    scale: Callable[[Parameter, int], np.ndarray]


@dataclass(frozen=True, eq=False)
class Opened:
    """A checkpoint of which only names, shapes and the config have been read.

    read: `read(parameter, layer)` is one layer of a parameter (layer 0 of one that is not
        stacked) in our orientation, `parameter.shape(config)` without its `layers` axis, in the
        dtype that it is stored in. It may be called from several threads.
    stored_dtype: that of the weights; float32 where they are mixed. Of a model in int8, that of
        what is left in floats.
    int8: what is stored in int8, if anything is.
    step: the training step that it is the checkpoint of, where that is known.
    facts: what is known of the training, for a model card: name → value.
    """

    config: ModelConfig
    read: Callable[[Parameter, int], np.ndarray]
    stored_dtype: str
    source: str
    tokenizer_files: dict[str, bytes] = field(default_factory=dict, repr=False)
    step: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    int8: Int8 | None = None

    def layers(self, parameter: Parameter) -> range:
        """The layers that `read` takes for a parameter."""
        return range(self.config.num_hidden_layers if parameter.stacked else 1)

    def model(self, dtype: DTypeLike = jnp.float32) -> Model:
        """All of it in memory, on the mesh around us if there is one; what is int8 stays so.

        Beside the model being built there is one parameter of it, its layers stacked; on a mesh one
        layer of it.
        """
        return Model(
            params=self._params(jnp.dtype(dtype), self.int8),
            config=self.config,
            tokenizer_files=self.tokenizer_files,
            stored_dtype=self.stored_dtype,
            source=self.source,
            step=self.step,
            facts=self.facts,
        )

    def params(self, dtype: DTypeLike = jnp.float32) -> Params:
        """The tree of parameters in `dtype`, all floats, each device with its own part.

        On a mesh this host holds one layer of one parameter, beside the parts of its devices.
        """
        return self._params(jnp.dtype(dtype), None)

    def _params(self, dtype: np.dtype, int8: Int8 | None) -> Params:
        def placed(parameter: Parameter) -> jax.Array | Quantized:
            if int8 is None or parameter.path not in int8.paths:
                return self._placed(parameter, self.read, dtype)
            values, scale = parameter.int8
            return Quantized(
                self._placed(values, int8.values, np.dtype(np.int8)),
                self._placed(scale, int8.scale, np.dtype(np.float32)),
                dynamic=int8.dynamic,
                dtype=dtype,
            )

        return parameters.tree(placed)

    def _placed(
        self, parameter: Parameter, read: Callable[[Parameter, int], np.ndarray], dtype: np.dtype
    ) -> jax.Array:
        """A parameter's layers as `read` gives them, stacked, as its axes say."""
        mesh = jax.sharding.get_mesh()

        def whole() -> np.ndarray:
            out = np.empty(parameter.shape(self.config), dtype)
            for layer in self.layers(parameter):
                target = out[layer] if parameter.stacked else out
                target[...] = read(parameter, layer)
            return out

        if mesh.empty:
            return jnp.asarray(whole())
        if not by_layer(parameter):
            return _on(mesh, parameter.axes, whole())
        place = sharding.sharding(mesh, parameter.axes)
        # Functions of this module, which the next checkpoint of the model compiles no more.
        empty = jax.jit(_empty, static_argnums=(0, 1), out_shardings=place)
        out = empty(parameter.shape(self.config), dtype)
        put = jax.jit(_put, donate_argnums=0, out_shardings=place)
        for layer in self.layers(parameter):
            value = read(parameter, layer).astype(dtype, copy=False)
            out = put(out, _on(mesh, parameter.axes[1:], value), layer)
        return out


def _on(mesh: Any, axes: Sequence[str], value: np.ndarray) -> jax.Array:
    place = sharding.sharding(mesh, axes)
    return jax.make_array_from_callback(value.shape, place, lambda index: value[index])


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    return jnp.zeros(shape, dtype)


def _put(whole: jax.Array, part: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(whole, part, layer, 0)


def from_model(model: Model) -> Opened:
    """A model in memory as a checkpoint to be written."""
    table = {p.path: array for p, array in parameters.items(model.params)}

    def read(parameter: Parameter, layer: int) -> np.ndarray:
        array = table[parameter.path]
        if parameter.stacked:
            array = jax.tree.map(lambda a: a[layer], array)
        if not isinstance(array, Quantized):
            return np.asarray(array)
        value = np.asarray(array.values) * np.asarray(array.scale)[:, None]
        return value.T if parameter.transposed else value

    return Opened(
        config=model.config,
        read=read,
        stored_dtype=model.stored_dtype,
        source=model.source,
        tokenizer_files=model.tokenizer_files,
        step=model.step,
        facts=model.facts,
    )
