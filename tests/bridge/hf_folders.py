"""For the tests of Hugging Face folders: theirs written, ours made, and both looked into."""

from typing import Any

import jax
import numpy as np
import torch
from reference import TINY, hf_model, random_params
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pythia_jax.bridge import Model
from pythia_jax.model.gptneox import forward

load_theirs: Any = AutoModelForCausalLM.from_pretrained
TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def write_theirs(folder, config=TINY, dtype="float32", **how):
    """A folder as transformers writes it."""
    model: Any = hf_model(random_params(config), config)
    model.to(TORCH_DTYPES[dtype]).save_pretrained(folder, **how)
    return folder


def stored(folder):
    """Name → (dtype, shape, bytes) of every tensor in the folder's safetensors files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            assert name not in found
            raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            found[name] = (str(tensor.dtype), tuple(tensor.shape), raw)
    return found


def our_model(config=TINY, **fields):
    return Model(params=random_params(config), config=config, **fields)


def our_logits(model, tokens):
    return np.asarray(jax.jit(lambda p: forward(p, tokens, model.config))(model.params))
