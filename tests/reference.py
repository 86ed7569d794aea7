"""The independent reference: transformers' GPTNeoX on torch, given our weights."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any
from unittest import mock

import numpy as np
import torch
from random_inputs import TINY as TINY
from random_inputs import distance as distance
from random_inputs import random_params as random_params
from random_inputs import random_tokens as random_tokens
from torch.nn import functional
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from pythia_jax.bridge import hf_config
from pythia_jax.configs import ModelConfig
from pythia_jax.model.parameters import TABLE, Params, items

torch.set_num_threads(1)


def hf_model(
    params: Params,
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    attention: str = "eager",
) -> GPTNeoXForCausalLM:
    """transformers' model with these weights, in eval mode."""
    fields = hf_config.config_json(config, "float32", eod=0)
    fields["attn_implementation"] = attention
    model: Any = GPTNeoXForCausalLM(GPTNeoXConfig(**fields))
    model = model.to(dtype)
    state = {}
    for parameter, array in items(params):
        layers = np.asarray(array) if parameter.stacked else [np.asarray(array)]
        for name, value in zip(parameter.hf_names(config), layers, strict=True):
            state[name] = torch.tensor(value.T if parameter.transposed else value)
    state["lm_head.weight"] = state.pop("embed_out.weight")
    missing, surplus = model.load_state_dict(state, strict=False)
    assert not missing and not surplus, (missing, surplus)
    return model.eval()


def hf_logits(model: GPTNeoXForCausalLM, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens).long(), use_cache=False).logits.numpy()


def hf_token_losses(model: GPTNeoXForCausalLM, tokens: np.ndarray) -> torch.Tensor:
    """`[batch, seq]` next-token losses of tokens `[batch, seq + 1]`, by torch's cross_entropy."""
    rows = torch.tensor(tokens).long()
    logits = model(rows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")


def hf_gradients(model: GPTNeoXForCausalLM, config: ModelConfig) -> dict[str, np.ndarray]:
    """Gradients of the torch model by path in our table, stacked and turned our way."""
    named = dict(model.named_parameters())
    named["embed_out.weight"] = named.pop("lm_head.weight")
    out = {}
    for parameter in TABLE:
        grads = []
        for name in parameter.hf_names(config):
            grad = named[name].grad
            assert grad is not None, name
            grads.append(grad.numpy().T if parameter.transposed else grad.numpy())
        out[parameter.path] = np.stack(grads) if parameter.stacked else grads[0]
    return out


Change = Callable[[int, torch.Tensor], torch.Tensor]
HF_SITES = (
    "embed",
    "resid_pre",
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.scores",
    "attn.pattern",
    "attn.z",
    "attn_out",
    "mlp_in",
    "mlp.pre",
    "mlp.post",
    "mlp_out",
    "resid_post",
    "ln_final",
)
"""Our sites that are a tensor of transformers' model: all but the split readers."""
HF_READERS = ("attn.q_in", "attn.k_in", "attn.v_in")
"""In the order of the fused projection's output: queries, keys, values."""


class HFSites:
    """transformers' values at our sites, by forward hooks, while the context is open.

    Each site's value is cloned on its way, so that its gradient is that of this place alone (the
    residual stream has several readers). `change[site](layer, value)` replaces values. Scores and
    pattern are the input and output of the eager attention's softmax. transformers has no place
    where each head reads a stream of its own; only where `change` names a split reader is one made:
    norm and fused projection run on every copy, and of each comes what its head keeps.
    """

    def __init__(
        self,
        model: GPTNeoXForCausalLM,
        config: ModelConfig,
        change: Mapping[str, Change] | None = None,
    ) -> None:
        self._model, self._config = model, config
        self._change = dict(change or {})
        self._values: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
        self._stack = ExitStack()

    def values(self) -> dict[str, np.ndarray]:
        return {site: self._stacked(site, values) for site, values in self._values.items()}

    def gradients(self) -> dict[str, np.ndarray]:
        """Gradients of what `backward` was called on."""
        grads = {}
        for site, values in self._values.items():
            assert all(value.grad is not None for value in values), site
            grads[site] = self._stacked(site, [value.grad for value in values])
        return grads

    @staticmethod
    def _stacked(site: str, values: Iterable[Any]) -> np.ndarray:
        arrays = [value.detach().numpy() for value in values]
        return arrays[0] if site in ("embed", "ln_final") else np.stack(arrays)

    def _see(self, site: str, layer: int, value: Any) -> torch.Tensor:
        value = value.clone()
        if site in self._change:
            value = self._change[site](layer, value)
        if value.requires_grad:
            value.retain_grad()
        self._values[site].append(value)
        return value

    def __enter__(self) -> "HFSites":
        heads, size = self._config.num_attention_heads, self._config.head_size

        def on_output(module: torch.nn.Module, site: str, layer: int) -> None:
            handle = module.register_forward_hook(lambda m, args, out: self._see(site, layer, out))
            self._stack.callback(handle.remove)

        def on_input(module: torch.nn.Module, see: Callable[[torch.Tensor], torch.Tensor]) -> None:
            handle = module.register_forward_pre_hook(lambda m, args: (see(args[0]), *args[1:]))
            self._stack.callback(handle.remove)

        def simple(site: str, layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda value: self._see(site, layer, value)

        def merged_heads(layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
            def see(value: torch.Tensor) -> torch.Tensor:
                split = value.reshape(*value.shape[:2], heads, size)
                return self._see("attn.z", layer, split).reshape(value.shape)

            return see

        def per_head(norm: Any, project: Any, copies: torch.Tensor) -> torch.Tensor:
            # Calling `forward` goes past the hooks. Head h keeps what it makes of copy h.
            made = project.forward(norm.forward(copies)).unflatten(-1, (heads, 3 * size))
            return made.diagonal(dim1=2, dim2=3).movedim(-1, 2)

        def split(norm: Any, project: Any, layer: int) -> list[torch.Tensor]:
            stream = self._values["resid_pre"][layer].unsqueeze(2).expand(-1, -1, heads, -1)
            made = [
                per_head(norm, project, self._see(reader, layer, stream)) for reader in HF_READERS
            ]
            return [part.split(size, dim=-1)[i] for i, part in enumerate(made)]

        def fused(norm: Any, layer: int) -> Callable[..., torch.Tensor]:
            def hook(module: torch.nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
                if self._change.keys().isdisjoint(HF_READERS):
                    parts = out.unflatten(-1, (heads, 3 * size)).split(size, dim=-1)
                else:
                    parts = split(norm, module, layer)
                names = ("attn.q", "attn.k", "attn.v")
                seen = [
                    self._see(name, layer, part) for name, part in zip(names, parts, strict=True)
                ]
                return torch.cat(seen, dim=-1).reshape(out.shape)

            return hook

        body = self._model.gpt_neox
        on_output(body.embed_in, "embed", 0)
        on_output(body.final_layer_norm, "ln_final", 0)
        for i, layer in enumerate(body.layers):
            attention: Any = layer.attention
            mlp: Any = layer.mlp
            on_input(layer, simple("resid_pre", i))
            on_output(layer, "resid_post", i)
            handle = attention.query_key_value.register_forward_hook(
                fused(layer.input_layernorm, i)
            )
            self._stack.callback(handle.remove)
            on_input(attention.dense, merged_heads(i))
            on_output(attention.dense, "attn_out", i)
            on_input(layer.post_attention_layernorm, simple("mlp_in", i))  # type: ignore[arg-type]
            on_output(mlp.dense_h_to_4h, "mlp.pre", i)
            on_input(mlp.dense_4h_to_h, simple("mlp.post", i))
            on_output(mlp.dense_4h_to_h, "mlp_out", i)

        softmax = functional.softmax

        def seen_softmax(scores: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            layer = len(self._values["attn.scores"])
            scores = self._see("attn.scores", layer, scores)
            return self._see("attn.pattern", layer, softmax(scores, *args, **kwargs))

        self._stack.enter_context(mock.patch.object(functional, "softmax", seen_softmax))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
