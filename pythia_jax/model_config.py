"""Which function a model computes, and how it is computed on this machine."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pythia_jax import suite
from pythia_jax.config_parsing import ConfigError, Section, build, require

EXACT_GELU = ("gelu", "gelu_python")
TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate")


def _size_fields(name: str) -> dict[str, Any]:
    try:
        entry = suite.lookup(name)
    except ValueError as error:
        raise ConfigError(f"model.size: {error}") from None
    return {
        key: getattr(entry, key)
        for key in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
            "initializer",
        )
    }


@dataclass(frozen=True)
class ModelConfig(Section, where="model"):
    """The function a GPT-NeoX model computes. Fields carry Hugging Face's names.

    `initializer` alone does not change the function: it is the distribution that training
    starts from (`small_wang` for 14m to 2.8b, `normal_scaled` for 6.9b and 12b).
    `rotary_precision` is that of the rotary angles, cosines and sines: GPT-NeoX v1.0 trained with
    half-precision ones, Hugging Face serves float32.
    `intermediate_size` of -1 stands for 4 x `hidden_size`.
    """

    _shorthands: ClassVar = {"size": _size_fields}

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int = 50304
    intermediate_size: int = -1
    max_position_embeddings: int = 2048
    rotary_pct: float = 0.25
    rotary_emb_base: float = 10000.0
    rotary_precision: Literal["float32", "float16", "bfloat16"] = "float32"
    layer_norm_eps: float = 1e-5
    hidden_act: str = "gelu_pytorch_tanh"
    use_parallel_residual: bool = True
    initializer: Literal["small_wang", "normal_scaled"] = "small_wang"

    def _check(self) -> None:
        if self.intermediate_size == -1:
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)
        for name, value in vars(self).items():
            if isinstance(value, int) and not isinstance(value, bool):
                require(value >= 1, f"model.{name}", value, "it must be at least 1")
        require(
            self.hidden_size % self.num_attention_heads == 0,
            "model.num_attention_heads",
            self.num_attention_heads,
            f"heads must divide hidden_size ({self.hidden_size})",
        )
        require(
            0.0 <= self.rotary_pct <= 1.0,
            "model.rotary_pct",
            self.rotary_pct,
            "it is a share of each head, between 0 and 1",
        )
        require(
            self.rotary_size % 2 == 0,
            "model.rotary_pct",
            self.rotary_pct,
            f"int(head size {self.head_size} x rotary_pct) = {self.rotary_size} must be even",
        )
        require(
            self.rotary_emb_base > 0,
            "model.rotary_emb_base",
            self.rotary_emb_base,
            "it must be > 0",
        )
        require(
            self.rotary_precision != "float16" or self.max_position_embeddings <= 65505,
            "model.rotary_precision",
            self.rotary_precision,
            f"float16 counts to 65504, and there are {self.max_position_embeddings} positions",
        )
        require(
            self.layer_norm_eps > 0, "model.layer_norm_eps", self.layer_norm_eps, "it must be > 0"
        )
        known = EXACT_GELU + TANH_GELU
        require(
            self.hidden_act in known,
            "model.hidden_act",
            self.hidden_act,
            f"choose one of {', '.join(known)}",
        )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_size(self) -> int:
        """Leading dimensions of each head that are rotated."""
        return int(self.head_size * self.rotary_pct)

    @property
    def tanh_gelu(self) -> bool:
        return self.hidden_act in TANH_GELU

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "ModelConfig":
        """From plain values, every key and type checked; raises ConfigError."""
        return build(cls, mapping, "model")

    @classmethod
    def from_size(cls, name: str, **overrides: Any) -> "ModelConfig":
        """The model of a suite size (`70m`, `pythia-70m-deduped`, old names too)."""
        return build(cls, {**overrides, "size": name}, "model")


Attention = Literal["auto", "splash", "cudnn", "xla", "einsum"]

REMAT_NAMES = ("resid_pre", "attn.qkv", "attn.z", "attn_out", "mlp.pre", "mlp.post", "mlp_out")
"""Values of a block that `remat` can name, to be kept and not recomputed."""


def check_remat(key: str, remat: str) -> None:
    """Refuse what is neither a policy nor names of `REMAT_NAMES`. Raises ConfigError."""
    unknown = [name for name in remat.split(",") if name.strip() not in REMAT_NAMES]
    require(
        remat in ("none", "dots", "full") or not unknown,
        key,
        remat,
        f"choose none, dots or full, or names out of {', '.join(REMAT_NAMES)}, commas between them",
    )


@dataclass(frozen=True)
class Runtime(Section, where="runtime"):
    """How a model is computed; none of it changes the function, only its rounding, speed, memory.

    dtype: of the computation; None takes that of the parameters. LayerNorm statistics, softmax,
        the rotation and the loss are at least float32 whatever it says.
    attention: `splash` is a kernel for TPUs, `cudnn` one for GPUs, both for first derivatives
        only; `xla` works in blocks of queries and never holds all scores, `einsum` holds them,
        and both run and differentiate anywhere. `auto` takes the first of them that can run.
    remat: what the backward pass recomputes: nothing (`none`), all but matrix products and what
        attention gave (`dots`), each block whole (`full`), or all but the values named, with
        commas between them: `attn.z,mlp.pre` (`REMAT_NAMES`).
    scan_layers: one compiled block run by `jax.lax.scan`, or every layer compiled on its own.
    loss: `fused` forms the gradient of the unembedding in the forward pass (one derivative in
        reverse, any number forward); `remat` recomputes chunks, for reverse over reverse.
    loss_chunk: tokens whose logits exist at once.
    """

    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    attention: Attention = "auto"
    remat: str = "none"
    scan_layers: bool = True
    loss: Literal["fused", "remat"] = "fused"
    loss_chunk: int = 512

    def _check(self) -> None:
        check_remat("runtime.remat", self.remat)
        require(self.loss_chunk >= 1, "runtime.loss_chunk", self.loss_chunk, "at least 1 token")
