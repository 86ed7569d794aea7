"""The configs that ship: each loads, and says what the run it is named after really did."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from pythia_jax import configs
from pythia_jax.suite import CHECKPOINT_STEPS, SUITE

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "configs"
# EleutherAI's own training files, where someone has laid them beside the clone.
UPSTREAM = ROOT.parent / "shared" / "data" / "neox_configs"

PILE = "data/pile_20B_tokenizer_text_document"
DEDUPED_PILE = "data/pile_0.87_deduped_text_document"


class Run(NamedTuple):
    layers: int
    width: int
    heads: int
    vocab: int
    initializer: str
    peak: float
    floor: float
    eval_every: int
    archive: str


# Written out, not read from the package: a slip in the suite's table must show here.
RUNS = {
    "14m": Run(6, 128, 4, 50304, "small_wang", 1e-3, 1e-4, 100_000, "state"),
    "31m": Run(6, 256, 8, 50304, "small_wang", 1e-3, 1e-4, 100_000, "state"),
    "70m": Run(6, 512, 8, 50304, "small_wang", 1e-3, 1e-4, 100_000, "state"),
    "160m": Run(12, 768, 12, 50304, "small_wang", 6e-4, 6e-5, 40_000, "state"),
    "410m": Run(24, 1024, 16, 50304, "small_wang", 3e-4, 3e-5, 40_000, "state"),
    "1b": Run(16, 2048, 8, 50304, "small_wang", 2.5e-4, 2.5e-5, 40_000, "state"),
    "1.4b": Run(24, 2048, 16, 50304, "small_wang", 2e-4, 2e-5, 40_000, "state"),
    "2.8b": Run(32, 2560, 32, 50304, "small_wang", 1.6e-4, 1.6e-5, 40_000, "params"),
    "6.9b": Run(32, 4096, 32, 50432, "normal_scaled", 1.2e-4, 1.2e-5, 1_000, "params"),
    "12b": Run(36, 5120, 40, 50688, "normal_scaled", 1.2e-4, 1.2e-5, 1_000, "params"),
}
DEDUPED = ["70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b"]
NAMES = [f"pythia-{size}" for size in RUNS] + [f"pythia-{size}-deduped" for size in DEDUPED]


def size_of(name: str) -> str:
    return name.removeprefix("pythia-").removesuffix("-deduped")


def read(name: str) -> tuple[configs.RunConfig, configs.ModelConfig]:
    config = configs.load(FOLDER / f"{name}.yaml")
    assert config.model is not None
    return config, config.model


def test_ten_sizes_and_eight_deduplicated_runs_ship():
    assert sorted(path.stem for path in FOLDER.glob("pythia-*.yaml")) == sorted(NAMES)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_survives_a_round_trip(path):
    config = configs.load(path)
    assert configs.from_dict(configs.to_dict(config)) == config


@pytest.mark.parametrize("name", NAMES)
def test_config_says_what_the_run_did(name):
    config, model = read(name)
    assert config.name == name
    assert RUNS[size_of(name)] == Run(
        layers=model.num_hidden_layers,
        width=model.hidden_size,
        heads=model.num_attention_heads,
        vocab=model.vocab_size,
        initializer=model.initializer,
        peak=config.optimizer.peak_learning_rate,
        floor=config.optimizer.min_learning_rate,
        eval_every=config.evaluation.every,
        archive=config.checkpoint.archive,
    )


@pytest.mark.parametrize("name", NAMES)
def test_config_agrees_with_the_suite(name):
    config, _ = read(name)
    entry = SUITE[size_of(name)]
    assert name in entry.names
    assert config.optimizer.peak_learning_rate == entry.peak_learning_rate
    assert config.optimizer.min_learning_rate == entry.min_learning_rate
    assert config.evaluation.every == entry.eval_interval


@pytest.mark.parametrize("name", NAMES)
def test_what_all_runs_share_is_shared(name):
    config, model = read(name)
    assert (config.training.steps, config.training.batch_size) == (143_000, 1024)
    assert (config.data.sequence_length, config.data.seed) == (2048, 1234)
    # Open, which is GPT-NeoX's, but refuses data that is shuffled already.
    assert config.data.order is None
    assert config.optimizer.betas == (0.9, 0.95)
    assert (config.optimizer.eps, config.optimizer.weight_decay) == (1e-8, 0.1)
    assert (config.optimizer.gradient_clip, config.optimizer.warmup_fraction) == (1.0, 0.01)
    assert config.optimizer.schedule == "neox_v1"
    assert (config.evaluation.steps, config.logging.every) == (10, 10)
    assert (model.rotary_pct, model.rotary_emb_base) == (0.25, 10000.0)
    assert (model.max_position_embeddings, model.layer_norm_eps) == (2048, 1e-5)
    assert (model.hidden_act, model.use_parallel_residual) == ("gelu_pytorch_tanh", True)
    assert model.intermediate_size == 4 * model.hidden_size


@pytest.mark.parametrize("name", NAMES)
def test_every_run_keeps_the_154_checkpoints_in_a_folder_of_its_own(name):
    config, _ = read(name)
    assert config.checkpoint_steps == CHECKPOINT_STEPS
    assert config.checkpoint.directory == f"runs/{name}"


@pytest.mark.parametrize("name", NAMES)
def test_validation_is_training_data_as_in_the_original(name):
    config, _ = read(name)
    expected = DEDUPED_PILE if name.endswith("-deduped") else PILE
    assert config.data.train == config.data.validation == (expected,)


# Below: the same numbers, read from the files that EleutherAI trained with.


def _upstream(text: str) -> dict[str, Any]:
    """A training file's settings, its hyphens and underscores made one spelling."""
    # 12b's lacks the comma behind attention-config, without which it is not YAML.
    text = re.sub(r'("attention-config": \S+ \d+\]\])(?!,)', r"\1,", text)
    return {key.replace("-", "_"): value for key, value in yaml.safe_load(text).items()}


def _floats(*values: Any) -> list[float]:
    # YAML 1.1 reads a number with an exponent but no point as text.
    return [float(value) for value in values]


@pytest.mark.parametrize("path", sorted(UPSTREAM.glob("*.yml")), ids=lambda path: path.stem)
def test_config_agrees_with_the_upstream_training_file(path):
    text = path.read_text(encoding="utf-8")
    theirs = _upstream(text)
    config, model = read(path.stem)
    entry = SUITE[size_of(path.stem)]

    assert theirs["num_layers"] == model.num_hidden_layers
    assert theirs["hidden_size"] == model.hidden_size
    assert theirs["num_attention_heads"] == model.num_attention_heads
    assert theirs["max_position_embeddings"] == model.max_position_embeddings
    assert theirs["rotary_pct"] == model.rotary_pct
    assert theirs["gpt_j_residual"] == model.use_parallel_residual
    small_wang = theirs.get("init_method") == "small_init"
    assert (theirs.get("output_layer_init_method") == "wang_init") == small_wang
    assert model.initializer == ("small_wang" if small_wang else "normal_scaled")

    adam = theirs["optimizer"]["params"]
    assert _floats(adam["lr"], theirs["min_lr"]) == [
        config.optimizer.peak_learning_rate,
        config.optimizer.min_learning_rate,
    ]
    assert _floats(*adam["betas"], adam["eps"]) == [*config.optimizer.betas, config.optimizer.eps]
    assert theirs["weight_decay"] == config.optimizer.weight_decay
    assert theirs["gradient_clipping"] == config.optimizer.gradient_clip
    assert theirs["warmup"] == config.optimizer.warmup_fraction
    assert theirs["lr_decay_iters"] == theirs["train_iters"] == config.training.steps

    assert theirs["seq_length"] == config.data.sequence_length
    assert theirs["eval_interval"] == config.evaluation.every
    assert theirs["eval_iters"] == config.evaluation.steps
    assert theirs["log_interval"] == config.logging.every
    assert theirs["checkpoint_factor"] == config.checkpoint.every
    assert theirs["extra_save_iters"] == list(config.checkpoint.extra_steps)

    assert theirs["model_parallel_size"] == entry.model_parallel
    assert theirs["train_micro_batch_size_per_gpu"] == entry.micro_batch
    accumulation = theirs.get("gradient_accumulation_steps", theirs.get("gas"))
    assert accumulation == entry.gradient_accumulation
    gpus = re.search(r"trained on (\d+) gpus", text)
    assert gpus is not None
    assert int(gpus[1]) == entry.gpus
