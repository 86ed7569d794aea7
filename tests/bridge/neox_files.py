"""GPT-NeoX's YAML files: what the suite's say, and files written from it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pythia_jax.bridge import neox_config
from pythia_jax.configs import ConfigError

ROOT = Path(__file__).resolve().parents[2]
# EleutherAI's own training files, where someone has laid them beside the clone.
UPSTREAM = ROOT.parent / "shared" / "data" / "neox_configs"


class Facts(NamedTuple):
    """What EleutherAI/pythia's models/*/pythia-SIZE.yml says, where the sizes differ."""

    layers: int
    width: int
    heads: int
    lr: float
    min_lr: float
    micro: int
    gas: int
    mp: int
    pp: int
    zero: int
    small: bool
    eval_interval: int


FACTS = {
    "14m": Facts(6, 128, 4, 1e-3, 1e-4, 32, 1, 1, 0, 0, True, 100_000),
    "31m": Facts(6, 256, 8, 1e-3, 1e-4, 32, 1, 1, 0, 0, True, 100_000),
    "70m": Facts(6, 512, 8, 1e-3, 1e-4, 32, 1, 1, 1, 1, True, 100_000),
    "160m": Facts(12, 768, 12, 6e-4, 6e-5, 32, 1, 1, 1, 1, True, 40_000),
    "410m": Facts(24, 1024, 16, 3e-4, 3e-5, 32, 1, 1, 1, 1, True, 40_000),
    "1b": Facts(16, 2048, 8, 2.5e-4, 2.5e-5, 16, 1, 1, 1, 1, True, 40_000),
    "1.4b": Facts(24, 2048, 16, 2e-4, 2e-5, 16, 1, 1, 1, 1, True, 40_000),
    "2.8b": Facts(32, 2560, 32, 1.6e-4, 1.6e-5, 16, 1, 1, 1, 1, True, 40_000),
    "6.9b": Facts(32, 4096, 32, 1.2e-4, 1.2e-5, 8, 2, 2, 1, 1, False, 1_000),
    "12b": Facts(36, 5120, 40, 1.2e-4, 1.2e-5, 8, 2, 4, 1, 1, False, 1_000),
}
DEDUPED = ("70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")
NAMES = [f"pythia-{size}" for size in FACTS] + [f"pythia-{size}-deduped" for size in DEDUPED]


def upstream(name: str) -> dict[str, Any]:
    """The file of a run, sound where upstream's is not, in the spelling that it has."""
    size = name.removeprefix("pythia-").removesuffix("-deduped")
    f = FACTS[size]
    folder = "/fsx/pile_deduped" if name.endswith("deduped") else "/fsx/pile"
    file = "pile_0.87_deduped_text_document"
    if not name.endswith("deduped"):
        file = "pile_20B_tokenizer_text_document"
    if size in ("14m", "31m"):
        folder = "/mnt/ssd-2/pile_deduped"
    init = {"init_method": "small_init", "output_layer_init_method": "wang_init"}
    large = size in ("6.9b", "12b")
    bucket = 1_260_000_000 if large else 500_000_000
    return {
        "pipe-parallel-size": f.pp,
        "model-parallel-size": f.mp,
        "num-layers": f.layers,
        "hidden-size": f.width,
        "num-attention-heads": f.heads,
        "seq-length": 2048,
        "max-position-embeddings": 2048,
        "pos-emb": "rotary",
        "rotary_pct" if large else "rotary-pct": 0.25,
        "no-weight-tying": True,
        "gpt_j_residual" if large else "gpt-j-residual": True,
        "output_layer_parallelism" if large else "output-layer-parallelism": "column",
        "attention-config": [[["flash"], f.layers]],
        "scaled-upper-triang-masked-softmax-fusion": True,
        "bias-gelu-fusion": True,
        **(init if f.small else {"norm": "layernorm"}),
        "optimizer": {
            "type": "Adam",
            "params": {"lr": f.lr, "betas": [0.9, 0.95], "eps": 1.0e-8},
        },
        "min_lr": f.min_lr,
        "zero_optimization": {"stage": f.zero, "reduce_bucket_size": bucket, "cpu_offload": False},
        "train_micro_batch_size_per_gpu": f.micro,
        "gradient_accumulation_steps" if large else "gas": f.gas,
        "data-impl": "mmap",
        "checkpoint-activations": True,
        "checkpoint-num-layers": 1,
        "partition-activations": True,
        "synchronize-each-layer": True,
        "gradient_clipping": 1.0,
        "weight-decay": 0.1,
        "hidden-dropout": 0,
        "attention-dropout": 0,
        "fp16": {
            "fp16": True,
            "enabled": True,
            "loss_scale": 0,
            "loss_scale_window": 1000,
            "initial_scale_power": 12,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "train-iters": 143_000,
        "lr-decay-iters": 143_000,
        "distributed-backend": "nccl",
        "lr-decay-style": "cosine",
        "warmup": 0.01,
        "checkpoint-factor": 1000,
        "extra-save-iters": [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512],
        "eval-interval": f.eval_interval,
        "eval-iters": 10,
        "log-interval": 10,
        "steps_per_print": 10,
        "wall_clock_breakdown": True,
        **{f"{split}-data-paths": [f"{folder}/{file}"] for split in ("train", "valid", "test")},
        "tokenizer_type" if large else "tokenizer-type": "HFTokenizer",
        "vocab-file": "/fsx/pile/20B_tokenizer.json",
        "launcher": "slurm",
        "deepspeed_slurm": True,
    }


def write_into(folder: Path, changes=(), drop=(), name="pythia-70m", file=None) -> Path:
    """A suite file with changes, as GPT-NeoX takes it."""
    values = {**upstream(name), **dict(changes)}
    path = folder / (file or f"{name}.yml")
    path.write_text(json.dumps({k: v for k, v in values.items() if k not in drop}, indent=2))
    return path


def error_of(*paths, **how):
    with pytest.raises(ConfigError) as error:
        neox_config.read(*paths, **how)
    message = str(error.value)
    assert "\n" not in message
    assert str(paths[0]) in message
    return message


def listed(items, start):
    """The one line of a list that begins so."""
    (line,) = [item for item in items if item.startswith(start)]
    return line
