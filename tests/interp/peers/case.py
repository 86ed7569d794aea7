"""The small model and the tokens that the goldens of the peers were made with; NumPy alone.

Weights and tokens are read off the bits of NumPy's PCG64, whose stream is promised to stay as it
is, so that any environment makes the very same ones.
"""

import hashlib
import math

import numpy as np

HIDDEN, LAYERS, HEADS, VOCAB, POSITIONS = 32, 2, 4, 256, 32
SEQ = 24
"""Positions of a row; a row of tokens has one more."""

SHAPES = {
    "embed_in/embedding": (VOCAB, HIDDEN),
    "layers/input_layernorm/scale": (LAYERS, HIDDEN),
    "layers/input_layernorm/bias": (LAYERS, HIDDEN),
    "layers/post_attention_layernorm/scale": (LAYERS, HIDDEN),
    "layers/post_attention_layernorm/bias": (LAYERS, HIDDEN),
    "layers/attention/query_key_value/kernel": (LAYERS, HIDDEN, 3 * HIDDEN),
    "layers/attention/query_key_value/bias": (LAYERS, 3 * HIDDEN),
    "layers/attention/dense/kernel": (LAYERS, HIDDEN, HIDDEN),
    "layers/attention/dense/bias": (LAYERS, HIDDEN),
    "layers/mlp/dense_h_to_4h/kernel": (LAYERS, HIDDEN, 4 * HIDDEN),
    "layers/mlp/dense_h_to_4h/bias": (LAYERS, 4 * HIDDEN),
    "layers/mlp/dense_4h_to_h/kernel": (LAYERS, 4 * HIDDEN, HIDDEN),
    "layers/mlp/dense_4h_to_h/bias": (LAYERS, HIDDEN),
    "final_layer_norm/scale": (HIDDEN,),
    "final_layer_norm/bias": (HIDDEN,),
    "embed_out/kernel": (HIDDEN, VOCAB),
}


def weights() -> dict[str, np.ndarray]:
    """float32 by path in our table: nothing at 0 or 1, and attention that is not flat."""
    return {path: _weight(path, shape) for path, shape in SHAPES.items()}


def _weight(path: str, shape: tuple[int, ...]) -> np.ndarray:
    # Odd multiples of a power of two with 11 bits: exact in float32, uniform, deviation 1182.
    whole = 2 * _draw(path, 11, shape) - 2047
    exponent = -12 if path.endswith(("kernel", "embedding")) else -14
    return (whole * 2.0**exponent + path.endswith("scale")).astype(np.float32)


def tokens(name: str, rows: int, length: int = SEQ + 1) -> np.ndarray:
    """int32 `[rows, length]`, other ones for each name."""
    return _draw(f"tokens {name}", VOCAB.bit_length() - 1, (rows, length)).astype(np.int32)


def clean_and_corrupt() -> tuple[np.ndarray, np.ndarray]:
    """Two batches `[2, 12]` that differ in three tokens of each row."""
    clean = tokens("clean", 2, 12)
    corrupt = clean.copy()
    corrupt[:, [2, 5, 6]] = tokens("corrupt", 2, 3)
    return clean, corrupt


ANSWER, WRONG = 17, 101
"""Tokens of the metric: the difference of their logits at the last position."""


def _draw(name: str, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    raw = np.random.PCG64(seed).random_raw(math.prod(shape))
    return (raw >> np.uint64(64 - bits)).astype(np.int64).reshape(shape)
