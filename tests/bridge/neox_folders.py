"""GPT-NeoX checkpoints as DeeperSpeed writes them, by torch, from parameters of ours.

Modules are registered in GPT-NeoX v1.0's order (megatron/model/transformer.py), so that the order
of tensors in files and in optimizer groups is torch's own doing.
"""

from typing import Any

import numpy as np
import torch
import yaml
from flax import traverse_util
from torch import nn

from pythia_jax.configs import ModelConfig

CONFIG = ModelConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=128,
    max_position_embeddings=32,
)
YAML = {
    "pos-emb": "rotary",
    "rotary_pct": 0.25,
    "no-weight-tying": True,
    "gpt-j-residual": True,
    "bias-gelu-fusion": True,
    "init_method": "small_init",
    "output_layer_init_method": "wang_init",
    "hidden-dropout": 0,
    "attention_dropout": 0,
}


class Rotary(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.register_buffer("inv_freq", 1 / 10000 ** (torch.arange(0, size, 2).float() / size))


class Attention(nn.Module):
    def __init__(self, hidden, ranks, rotary):
        super().__init__()
        self.query_key_value = nn.Linear(hidden, 3 * hidden // ranks)
        self.rotary_emb = Rotary(rotary)
        self.dense = nn.Linear(hidden // ranks, hidden)


class MLP(nn.Module):
    def __init__(self, hidden, ranks, names):
        super().__init__()
        setattr(self, names[0], nn.Linear(hidden, 4 * hidden // ranks))
        setattr(self, names[1], nn.Linear(4 * hidden // ranks, hidden))


class Layer(nn.Module):
    def __init__(self, hidden, ranks, rotary, names):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(hidden)
        self.attention = Attention(hidden, ranks, rotary)
        self.post_attention_layernorm = nn.LayerNorm(hidden)
        self.mlp = MLP(hidden, ranks, names)


class Pipeline(nn.Module):
    """Places of the pipeline by number; 1 and L + 2 are functions."""

    def __init__(self, config, ranks, names=("dense_h_to_4h", "dense_4h_to_h")):
        super().__init__()
        hidden, depth = config.hidden_size, config.num_hidden_layers
        vocab = config.vocab_size // ranks
        embed, norm, out = nn.Module(), nn.Module(), nn.Module()
        embed.word_embeddings = nn.Embedding(vocab, hidden)
        norm.norm = nn.LayerNorm(hidden)
        out.final_linear = nn.Linear(hidden, vocab, bias=False)
        self.add_module("0", embed)
        for i in range(depth):
            self.add_module(str(i + 2), Layer(hidden, ranks, config.rotary_size, names))
        self.add_module(str(depth + 3), norm)
        self.add_module(str(depth + 4), out)


SUMMED = ("attention.dense.bias", "mlp.dense_4h_to_h.bias", "mlp.linear2.bias")


def shares(name, whole, ranks, add):
    """Each rank's part of a tensor. add: whether copies of summed biases add up to the bias."""
    if name.endswith(SUMMED):
        return [whole / ranks if add else whole] * ranks
    if "norm" in name:
        return [whole] * ranks
    inner = ("attention.dense.weight", "dense_4h_to_h.weight", "linear2.weight")
    return np.split(whole, ranks, 1 if name.endswith(inner) else 0)


def in_torch(params, config):
    """GPT-NeoX's name → the whole tensor, float32, in torch's orientation."""
    flat = {
        k: np.asarray(v, np.float32) for k, v in traverse_util.flatten_dict(params, sep="/").items()
    }
    depth, found = config.num_hidden_layers, {}
    found["0.word_embeddings.weight"] = flat["embed_in/embedding"]
    found[f"{depth + 3}.norm.weight"] = flat["final_layer_norm/scale"]
    found[f"{depth + 3}.norm.bias"] = flat["final_layer_norm/bias"]
    found[f"{depth + 4}.final_linear.weight"] = flat["embed_out/kernel"].T
    for i in range(depth):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{i + 2}.{norm}.weight"] = flat[f"layers/{norm}/scale"][i]
            found[f"{i + 2}.{norm}.bias"] = flat[f"layers/{norm}/bias"][i]
        linears = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h")
        for linear in (*linears, "mlp.dense_4h_to_h"):
            path = f"layers/{linear.replace('.', '/')}"
            found[f"{i + 2}.{linear}.weight"] = flat[f"{path}/kernel"][i].T
            found[f"{i + 2}.{linear}.bias"] = flat[f"{path}/bias"][i]
    return found


def pipelines(params, config, ranks=1, *, add=True, later_names=False):
    """A pipeline of modules for each rank, float32, filled. add: False for Adam's moments."""
    names = ("linear1", "linear2") if later_names else ("dense_h_to_4h", "dense_4h_to_h")
    whole = in_torch(params, config)
    made = [Pipeline(config, ranks, names) for _ in range(ranks)]
    with torch.no_grad():
        for name, _ in made[0].named_parameters():
            old = name.replace("linear1", "dense_h_to_4h").replace("linear2", "dense_4h_to_h")
            for pipeline, part in zip(made, shares(name, whole[old], ranks, add), strict=True):
                pipeline.get_parameter(name).copy_(torch.tensor(part))
    return made


class RandomStates:
    """Some object of a class that is not known here."""

    def __init__(self):
        self.states = {"model-parallel-rng": torch.zeros(4, dtype=torch.uint8)}


def client_state(config, step, ranks, **more):
    """What megatron/checkpointing.py and DeepSpeed's engine put beside the module."""
    return {
        "module": None,
        "optimizer": None,
        "lr_scheduler": {"num_iters": step, "decay_style": "cosine", "end_iter": 100},
        "csr_tensor_module_names": set(),
        "skipped_steps": 0,
        "global_steps": step,
        "iteration": step,
        "args": {
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "max_position_embeddings": config.max_position_embeddings,
            "padded_vocab_size": config.vocab_size,
            "model_parallel_size": ranks,
        },
        "np_rng_state": np.random.get_state(),
        "rng_tracker_states": RandomStates(),
        **more,
    }


def write_yaml(path, config, ranks=1, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {
        "num-layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num-attention-heads": config.num_attention_heads,
        "max-position-embeddings": config.max_position_embeddings,
        "model-parallel-size": ranks,
        **YAML,
        **more,
    }
    path.write_text(yaml.safe_dump(fields))


def write(save, config, made, step=3, *, dtype=torch.float16, sequential=False, **more):
    """`save/latest` and `save/global_stepN`, weights in dtype. more: of the client state."""
    folder = save / f"global_step{step}"
    folder.mkdir(parents=True)
    (save / "latest").write_text(folder.name)
    write_yaml(folder / "configs" / "model.yml", config, len(made))
    for rank, pipeline in enumerate(made):
        state: Any = {k: v.detach().to(dtype) for k, v in pipeline.state_dict().items()}
        client = client_state(config, step, len(made), **more)
        if sequential:
            client["module"] = {f"sequential.{name}": value for name, value in state.items()}
        else:
            for place, module in pipeline.named_children():
                layer = type(pipeline.state_dict())(
                    (name, state[f"{place}.{name}"]) for name in module.state_dict()
                )
                torch.save(
                    layer, folder / f"layer_{int(place):02d}-model_{rank:02d}-model_states.pt"
                )
        torch.save(client, folder / f"mp_rank_{rank:02d}_model_states.pt")
    return folder


def groups_of(pipeline):
    """Parameters in the two groups of megatron/model/utils.py, in their order."""
    decayed, others = [], []
    for module in pipeline.modules():
        own = list(module.named_parameters(recurse=False))
        if isinstance(module, nn.LayerNorm):
            others += [p for _, p in own]
        else:
            decayed += [p for name, p in own if name != "bias"]
            others += [p for name, p in own if name == "bias"]
    return [decayed, others]


class DynamicLossScaler:
    """deepspeed.runtime.fp16.loss_scaler's, as it is pickled: a class with these attributes."""

    def __init__(self, **state):
        vars(self).update(state)


def flat_groups(trees, config, ranks):
    """[rank][kind][group]: flat tensors of float32 weights, m and v, of a tree of ours each."""
    found = [{} for _ in range(ranks)]
    for kind, tree in trees.items():
        for rank, pipeline in enumerate(pipelines(tree, config, ranks, add=kind == "fp32")):
            found[rank][kind] = [
                torch.cat([p.detach().reshape(-1) for p in group]) for group in groups_of(pipeline)
            ]
    return found


def partitions(flat, data, most):
    """[rank][interval]: (piece, how much of it is padding), as ZeRO-1 cuts a flat tensor.

    most: elements an interval of communication (stage1.py: flatten_dense_tensors_sub_partition_
    aligned, get_data_parallel_sub_partitions, get_alignment_padding).
    """
    lean = flat.numel()
    size, limit = -(-lean // data), most // data
    count = 1 if size <= limit else -(-size // limit)
    size = size if size <= limit else limit
    padded = torch.cat([flat, torch.zeros(size * count * data - lean)])
    found = [[] for _ in range(data)]
    for i, piece in enumerate(padded.split(size)):
        found[i % data].append((piece, min(size, max(0, (i + 1) * size - lean))))
    return found


def zero_1(flat, data, most, form, *, count: int = 0, scaler: Any = None):
    """What each data-parallel rank's optimizer says, of one model-parallel rank's flat groups."""
    cut = {
        kind: [partitions(group, data, most) for group in groups] for kind, groups in flat.items()
    }
    states = []
    for rank in range(data):

        def piece(kind, group, i, rank=rank):
            value, padding = cut[kind][group][rank][i]
            return value if form == "rigid" else value[: value.numel() - padding]

        groups = [range(len(group[rank])) for group in cut["fp32"]]
        moments = [
            [{kind: piece(kind, g, i) for kind in ("exp_avg", "exp_avg_sq")} for i in intervals]
            for g, intervals in enumerate(groups)
        ]
        masters = [[piece("fp32", g, i) for i in intervals] for g, intervals in enumerate(groups)]
        state = {"loss_scaler": scaler, "dynamic_loss_scale": True, "overflow": False}
        if form == "elastic":
            state |= {"zero_stage": 1, "partition_count": data, "base_optimizer_state": moments}
            state |= {"local_sub_partitions_of_fp32_groups": masters}
        elif form == "rigid":
            state |= {"base_optimizer_state": as_torch_state(moments, count)}
            state |= {"local_sub_partitions_of_fp32_groups": masters}
        else:  # later DeepSpeed
            state |= {"zero_stage": 1, "partition_count": [data] * len(groups)}
            lean = [{**group[0], "step": torch.tensor(float(count))} for group in moments]
            state |= {"base_optimizer_state": lean}
            state |= {"single_partition_of_fp32_groups": [group[0] for group in masters]}
        states.append(state)
    return states


def as_torch_state(moments, count):
    """A torch optimizer's state_dict; apex's FusedAdam counts in the group."""
    numbers, state, groups = iter(range(10**6)), {}, []
    for group in moments:
        ids = [next(numbers) for _ in group]
        state.update(zip(ids, group, strict=True))
        groups.append({"params": ids, "lr": 0.1, "betas": (0.9, 0.95), "step": count})
    return {"state": state, "param_groups": groups}


def write_zero(folder, config, trees, data, *, ranks=1, most=500_000_000, form="elastic", **how):
    """`zero_pp_rank_…` files beside the weights."""
    made = pipelines(trees["fp32"], config, ranks)
    for model, flat in enumerate(flat_groups(trees, config, ranks)):
        shapes = {name: p.shape for name, p in made[model].named_parameters()}
        for rank, state in enumerate(zero_1(flat, data, most, form, **how)):
            tree: Any = {"optimizer_state_dict": state}
            if form != "rigid":
                tree["param_shapes"] = shapes
            torch.save(tree, folder / f"zero_pp_rank_{rank}_mp_rank_{model:02d}_optim_states.pt")
