"""The independent reference: transformers' GPTNeoX on torch, given our weights."""

import jax
import numpy as np
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from pythia_jax.bridge import hf
from pythia_jax.configs import ModelConfig
from pythia_jax.model.parameters import TABLE, Params, init_parameters, tree

torch.set_num_threads(1)

TINY = ModelConfig(
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=3,
    vocab_size=130,
    max_position_embeddings=64,
    hidden_act="gelu",
)


def random_params(config: ModelConfig, seed: int = 0, dtype: type = np.float32) -> Params:
    """Parameters with nothing left at 0 or 1: norms and biases are perturbed too."""
    params = init_parameters(config, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    flat = {p.path: value for p, value in hf.parameter_items(params)}

    def leaf(parameter):  # noqa: ANN001, ANN202
        value = np.asarray(flat[parameter.path], dtype)
        if parameter.init in ("zeros", "ones"):
            value = value + 0.1 * rng.standard_normal(value.shape)
        return jax.numpy.asarray(value.astype(dtype))

    return tree(leaf)


def random_tokens(config: ModelConfig, batch: int, seq: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, seq)).astype(np.int32)


def hf_model(
    params: Params,
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    attention: str = "eager",
) -> GPTNeoXForCausalLM:
    """transformers' model with these weights, in eval mode."""
    fields = hf.config_json(config, "float32", eod=0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**fields, attn_implementation=attention)).to(dtype)
    state = {name: torch.tensor(np.asarray(value)) for name, value in hf.tensors(params)}
    state["lm_head.weight"] = state.pop("embed_out.weight")
    missing, surplus = model.load_state_dict(state, strict=False)
    assert not missing and not surplus, (missing, surplus)
    return model.eval()


def hf_gradients(model: GPTNeoXForCausalLM, config: ModelConfig) -> dict[str, np.ndarray]:
    """Gradients of the torch model by path in our table, stacked and turned our way."""
    named = dict(model.named_parameters())
    named["embed_out.weight"] = named.pop("lm_head.weight")
    out = {}
    for parameter in TABLE:
        grads = [named[name].grad.numpy() for name in parameter.hf_names(config)]
        grads = [grad.T if parameter.transposed else grad for grad in grads]
        out[parameter.path] = np.stack(grads) if parameter.stacked else grads[0]
    return out
