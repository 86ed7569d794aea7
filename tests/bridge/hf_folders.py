"""For the tests of Hugging Face folders: theirs written, ours made, and both looked into."""

import json
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


def as_torch_files(folder, shards=1):
    """The same weights as `pytorch_model.bin`, as transformers wrote them before safetensors."""
    tensors = {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    names, weight_map = sorted(tensors), {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        part = {name: tensors[name] for name in names[i::shards]}
        torch.save(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
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
