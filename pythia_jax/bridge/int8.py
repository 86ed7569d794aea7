"""Int8 weights in a Hugging Face folder, in the words of compressed-tensors' `int-quantized`.

Beside `NAME.weight`, int8 `[out, in]`, lies `NAME.weight_scale`, float32 `[out, 1]`, and
config.json has a `quantization_config` that tells which modules these are, and whether activations
are rounded too: transformers, with the package compressed-tensors, loads such a folder as it is.
"""

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from pythia_jax.bridge.safetensors_out import BLOCK, Tensor, rounded
from pythia_jax.configs import ConfigError
from pythia_jax.model.parameters import Parameter
from pythia_jax.model.quantize import quantize

BITS = 8
FORMAT = "int-quantized"
_WEIGHTS = {"num_bits": BITS, "type": "int", "symmetric": True, "strategy": "channel"}
_ACTIVATIONS = {"num_bits": BITS, "type": "int", "symmetric": True, "strategy": "token"}


@dataclass(frozen=True)
class Scheme:
    """What becomes int8: the matrices of the layers, and the embeddings if `embeddings`.

    dynamic: whether the activations that they are multiplied with are to be rounded too.
    """

    dynamic: bool = False
    embeddings: bool = True

    def covers(self, parameter: Parameter) -> bool:
        """Whether a parameter becomes int8. Norms and biases stay as they are."""
        is_matrix = len(parameter.axes) - parameter.stacked == 2
        return is_matrix and (self.embeddings or not parameter.path.startswith("embed_"))

    def config_json(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""

        def group(targets: list[str], *, dynamic: bool) -> dict[str, Any]:
            return {
                "targets": targets,
                "format": FORMAT,
                "weights": {**_WEIGHTS, "dynamic": False},
                "input_activations": {**_ACTIVATIONS, "dynamic": True} if dynamic else None,
                "output_activations": None,
            }

        groups = {"group_0": group(["Linear"], dynamic=self.dynamic)}
        if self.embeddings:
            # Of these the input is a number of a token.
            groups["group_1"] = group(["Embedding"], dynamic=False)
        return {
            "quant_method": "compressed-tensors",
            "format": FORMAT,
            "quantization_status": "compressed",
            "config_groups": groups,
            # In files the unembedding is called embed_out, in transformers 5's memory lm_head.
            "ignore": [] if self.embeddings else ["embed_out", "lm_head"],
        }

    def in_words(self) -> str:
        what = "all matrices" if self.embeddings else "the layers' matrices"
        how = "int8 too, with a scale a token" if self.dynamic else "floats"
        return f"{what} in int8, with a float32 scale an output channel; activations {how}"


def scale_name(name: str) -> str:
    """The tensor with the scales of the tensor `name`."""
    return f"{name}_scale"


def read_dynamic(folder: Path) -> bool | None:
    """Whether activations are rounded too, by a folder's config.json; None if nothing is int8.

    Raises ConfigError for any other quantisation.
    """
    path = folder / "config.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    if found is None:
        return None
    try:
        groups = list(found["config_groups"].values())
        inputs = [g.get("input_activations") for g in groups if g["targets"] != ["Embedding"]]
        known = (
            (found["quant_method"], found["format"]) == ("compressed-tensors", FORMAT)
            and all(_is(group["weights"], {**_WEIGHTS, "dynamic": False}) for group in groups)
            and all(i is None or _is(i, {**_ACTIVATIONS, "dynamic": True}) for i in inputs)
            and len({i is None for i in inputs}) == 1
        )
    except (KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise ConfigError(
            f"{path}: quantization_config: only int8 weights are known here, symmetric, with a "
            "scale a channel, and activations that are floats or int8 with a scale a token, found "
            "on the way (quant_method compressed-tensors, format int-quantized); load the model "
            "that this one was made from"
        )
    return inputs[0] is not None


def _is(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return wanted.items() <= found.items()


def rounded_matrix(
    name: str, weight: Float[np.ndarray, "out in"]
) -> tuple[Int[np.ndarray, "out in"], Float[np.ndarray, " out"]]:
    """Values and scales of a matrix (`pythia_jax.model.quantize`), some rows of it at a time.

    Raises ValueError for numbers that are not finite.
    """
    values, scale = np.empty(weight.shape, np.int8), np.empty(len(weight), np.float32)
    rows = max(1, BLOCK // (4 * weight.shape[1]))
    for first in range(0, len(weight), rows):
        part = slice(first, first + rows)
        try:
            wide = rounded(name, weight[part], np.dtype(np.float32))
            values[part], scale[part] = quantize(wide)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return values, scale


def tensors(tensor: Tensor) -> list[Tensor]:
    """The two tensors that a matrix is stored in, each to be read once.

    The matrix is read and rounded for whichever of them is asked for first, and what belongs to
    the other is kept until it is taken.
    """
    lock, kept = threading.Lock(), {}

    def take(part: str) -> np.ndarray:
        with lock:
            if part not in kept:
                values, scale = rounded_matrix(tensor.name, tensor.read())
                kept.update(values=values, scale=scale[:, None])
            return kept.pop(part)

    shape, name = tensor.shape, scale_name(tensor.name)
    return [
        Tensor(tensor.name, shape, lambda: take("values"), "int8"),
        Tensor(name, (shape[0], 1), lambda: take("scale"), "float32"),
    ]
