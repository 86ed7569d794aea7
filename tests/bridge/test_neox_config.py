"""GPT-NeoX YAML files in: what the suite's files come to, and what is refused or told."""

import json

import pytest
import yaml
from neox_files import error_of, listed, upstream

from pythia_jax import configs
from pythia_jax.bridge import neox_config
from pythia_jax.bridge.neox_yaml import LAYOUT, QUIET, UNREAD
from pythia_jax.configs import ConfigError


def test_both_spellings_and_several_files_give_the_same_run(write, tmp_path):
    values = upstream("pythia-70m")
    hyphens = {key.replace("_", "-"): value for key, value in values.items()}
    scores = {key.replace("-", "_"): value for key, value in values.items()}
    run = neox_config.read(write()).run
    for i, spelled in enumerate((hyphens, scores)):
        path = tmp_path / str(i) / "pythia-70m.yml"
        path.parent.mkdir()
        path.write_text(yaml.safe_dump(spelled))
        assert neox_config.read(path).run == run
    first, second = tmp_path / "pythia-70m.yml", tmp_path / "local_setup.yml"
    items = list(values.items())
    first.write_text(yaml.safe_dump(dict(items[:20])))
    second.write_text(yaml.safe_dump(dict(items[20:])))
    neox = neox_config.read(first, second)
    assert neox.run == run
    assert neox.sources == (str(first), str(second))


def test_key_that_stands_twice_is_an_error_in_any_spelling(write, tmp_path):
    one = write({"num_layers": 6})
    assert "'num-layers' and 'num_layers' are one key" in error_of(one)
    other = tmp_path / "other.yml"
    other.write_text("num_layers: 6\n")
    with pytest.raises(ConfigError, match=r"other\.yml: 'num_layers' stands in .*pythia-70m\.yml"):
        neox_config.read(write(), other)


def test_no_file_is_an_error():
    with pytest.raises(ConfigError, match="name a GPT-NeoX YAML file"):
        neox_config.read()


def test_missing_keys_are_named_together_with_what_may_have_been_meant(write):
    message = error_of(write({"num-layer": 6}, drop=("num-layers", "train-iters")))
    assert "num-layers (is 'num-layer' it?), train-iters" in message


def test_unknown_key_is_listed_with_the_nearest_known_one(write):
    unhonoured = neox_config.read(write({"warm-up": 0.5})).unhonoured
    assert "nearest known one is 'warmup'" in listed(unhonoured, "warm-up: 0.5")
    block = {"enabled": True, "initial_scale_power": 12, "histeresis": 3}
    assert listed(neox_config.read(write({"fp16": block})).unhonoured, "fp16: histeresis")


def test_keys_of_layout_are_one_line_and_those_of_logging_none(write):
    neox = neox_config.read(write({"use_wandb": True, "wandb_team": "x", "dump-state": True}))
    line = listed(neox.unhonoured, "pipe-parallel-size")
    assert "partition-activations" in line
    assert "training.remat" in line
    assert not [item for item in neox.unhonoured if "wandb" in item or "launcher" in item]


def test_tables_of_keys_do_not_overlap():
    assert not (LAYOUT & QUIET or LAYOUT & UNREAD or QUIET & UNREAD)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num-layers": "6"}, "num-layers: '6' should be a whole number"),
        ({"rotary-pct": "much"}, "rotary-pct: 'much' should be a finite number"),
        ({"gpt-j-residual": 1}, "gpt-j-residual: 1 should be true or false"),
        ({"optimizer": [1]}, "optimizer: [1] should be a block of keys"),
        ({"extra-save-iters": 3}, "extra-save-iters: 3 should be a list of whole numbers"),
        ({"vocab-file": 3}, "vocab-file: 3 should be text"),
        ({"rotary-pct": 0.3}, "model.rotary_pct"),
        ({"min_lr": 1.0}, "optimizer.min_learning_rate"),
    ],
)
def test_value_of_the_wrong_kind_is_one_error(changes, told, write):
    assert told in error_of(write(changes))


# What would be another function or another recipe.


@pytest.mark.parametrize(
    "changes",
    [
        {"pos-emb": "learned"},
        {"pos-emb": "alibi"},
        {"pos-emb": None},
        {"no-weight-tying": False},
        {"no-weight-tying": None},
        {"norm": "rmsnorm"},
        {"activation": "swish"},
        {"activation": "geglu"},
        {"onnx-safe": True},
        {"gpt-j-tied": True},
        {"hidden-dropout": 0.1},
        {"attention-dropout": 0.1},
        {"hidden-dropout": None},
        {"attention-dropout": None},
        {"attention-config": [[["sparse_fixed"], 6]]},
        {"attention-config": [[["global", "local"], 3]]},
        {"attention-config": [[["global"], 5]]},
        {"attention-config": "flash"},
        {"num-unique-layers": 3},
        {"num-kv-heads": 2},
        {"soft-prompt-tuning": {"enabled": True}},
        {"use-mup": True},
        {"init_method": "normal"},
        {"output_layer_init_method": "orthogonal"},
        {"lr-decay-style": "linear"},
        {"lr-decay-style": None},
        {"eod-mask-loss": True},
        {"weight-by-num-documents": True},
        {"scheduler": {"type": "WarmupLR"}},
        {"curriculum-learning": {"enabled": True}},
        {"use-bnb-optimizer": True},
        {"no-load-optim": True},
        {"finetune": True},
        {"gradient_clipping": None},
        {"data-path": "/data/pile"},
        {"test-data-paths": None},
        {"optimizer": {"type": "sm3", "params": {"lr": 1e-3}}},
        {"optimizer": {"type": "Adam", "params": {"lr": 1e-3, "adam_w_mode": False}}},
        {"optimizer": {"type": "Adam", "params": {"lr": 1e-3, "weight_decay": 0.1}}},
        {"bf16": {"enabled": True}},
        {"amp": {"enabled": True}},
    ],
    ids=json.dumps,
)
def test_what_would_be_another_function_or_recipe_is_refused(changes, write):
    # A default is refused under the name that the file would have used.
    key = next(iter(changes)).replace("init_method", "").replace("output_layer_", "")
    assert key in error_of(write(changes))


def test_all_that_is_refused_is_told_at_once(write):
    message = error_of(write({"pos-emb": "alibi", "norm": "rmsnorm", "hidden-dropout": None}))
    for told in ("pos-emb: 'alibi'", "norm: 'rmsnorm'", "hidden-dropout: not set, which is 0.1"):
        assert told in message


@pytest.mark.parametrize(
    "harmless",
    [
        {"gpt-j-tied": True, "gpt-j-residual": False},
        {"attention-config": [[["global", "flash"], "all"]]},
        {"attention-config": ["flash"] * 6},
        {"soft-prompt-tuning": {"enabled": False}},
        {"num-unique-layers": 6},
        {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
    ],
    ids=json.dumps,
)
def test_what_comes_to_the_same_is_taken(harmless, write):
    neox_config.read(write(harmless))


# What a key becomes.


def read_run(path, **how):
    return configs.from_dict(neox_config.read(path, **how).run)


def test_defaults_of_gpt_neox_hold_where_a_key_is_left_out(write):
    path = write(
        {"optimizer": {"params": {"lr": 1e-3}}},
        drop=(
            "rotary-pct", "gpt-j-residual", "bias-gelu-fusion", "init_method", "min_lr",
            "output_layer_init_method", "weight-decay", "eval-interval", "eval-iters",
            "fp16", "lr-decay-iters", "extra-save-iters", "attention-config",
        ),
    )  # fmt: skip
    config = read_run(path)
    assert config.model is not None
    assert (config.model.rotary_pct, config.model.use_parallel_residual) == (1.0, False)
    # Only the fused kernel approximates by tanh.
    assert (config.model.hidden_act, config.model.initializer) == ("gelu", "normal_scaled")
    assert (config.optimizer.betas, config.optimizer.eps) == ((0.9, 0.999), 1e-8)
    assert (config.optimizer.min_learning_rate, config.optimizer.weight_decay) == (0.0, 0.01)
    assert (config.evaluation.every, config.evaluation.steps) == (1000, 100)
    assert config.training.precision == "float32"
    # The optimizer for float32 makes no dummy step that would set Adam's counter ahead.
    assert not config.optimizer.bias_correction_ahead
    assert config.optimizer.decay_steps is None
    assert config.checkpoint.extra_steps == ()


@pytest.mark.parametrize(
    ("changes", "section", "key", "value"),
    [
        ({"seed": 7}, "data", "seed", 7),
        ({"seed": 7}, "training", "seed", 7),
        ({"train-data-weights": [2.0]}, "data", "train_weights", (2.0,)),
        ({"lr-decay-iters": 1000}, "optimizer", "decay_steps", 1000),
        ({"warmup": 0.1}, "optimizer", "warmup_fraction", 0.1),
        ({"gradient_clipping": 0}, "optimizer", "gradient_clip", 1e30),
        ({"layernorm-epsilon": 1e-6}, "model", "layer_norm_eps", 1e-6),
        ({"rotary-emb-base": 500}, "model", "rotary_emb_base", 500.0),
        ({"make-vocab-size-divisible-by": 256}, "model", "vocab_size", 50_432),
        ({"model-parallel-size": 2, "gas": 2, "gradient_accumulation_steps": 2},
         "model", "vocab_size", 50_432),
        ({"model-parallel-size": 2, "gas": 2, "gradient_accumulation_steps": 2},
         "optimizer", "row_parallel_bias_multiple", 2),
        ({"model-parallel-size": 2, "gas": 2, "gradient_accumulation_steps": 2,
          "gpt-j-residual": False}, "optimizer", "row_parallel_bias_multiple", 1),
        ({"tokenizer-type": "GPT2BPETokenizer", "vocab-file": "a/gpt2-vocab.json"},
         "model", "vocab_size", 50_304),
        ({"fp16": {"enabled": True, "type": "bfloat16"}}, "training", "precision", "bfloat16"),
        ({"fp16": {"enabled": False}}, "training", "precision", "float32"),
        ({"fp16": None, "bf16": {"enabled": True}}, "training", "precision", "bfloat16"),
        ({"fp16": None, "precision": "bfloat16"}, "training", "precision", "bfloat16"),
        ({"save": "runs/x"}, "checkpoint", "directory", "runs/x"),
        ({"no-save-optim": True}, "checkpoint", "archive", "params"),
    ],
)  # fmt: skip
def test_key_becomes_ours(changes, section, key, value, write):
    config = read_run(write(changes))
    assert getattr(getattr(config, section), key) == value


def test_logarithmic_checkpoints_are_the_powers_and_the_last(write):
    log = {"checkpoint-scale": "log", "checkpoint-factor": 10, "extra-save-iters": [5]}
    config = read_run(write(log))
    assert config.checkpoint_steps == (1, 5, 10, 100, 1000, 10_000, 100_000, 143_000)


def test_one_path_is_split_as_gpt_neox_does_by_default(write):
    one = {"data-path": "data/all"}
    drop = ("train-data-paths", "valid-data-paths", "test-data-paths")
    assert read_run(write(one, drop)).data.split_shares == (969.0, 30.0, 1.0)
    config = read_run(write({**one, "split": "9, 1"}, drop))
    assert config.data.train == ("data/all",)
    assert config.data.split_shares == (9.0, 1.0, 0.0)


def test_fine_tuning_starts_from_the_weights_to_load(write):
    config = read_run(write({"load": "neox/pythia", "finetune": True}))
    assert config.initialize_from is not None
    assert config.initialize_from.model == "neox/pythia"
    assert (config.begins_at, config.initialize_from.optimizer_state) == (0, "zero")
    neox = neox_config.read(write({"load": "elsewhere", "save": "here"}))
    assert listed(neox.unhonoured, "load: 'elsewhere'")
    assert "initialize_from" not in neox.run


# Rows a step, and ids of the tokenizer.

SMALL = {"hidden-size": 48, "num-attention-heads": 3, "num-layers": 2, "attention-config": None}


@pytest.mark.parametrize(
    ("changes", "gpus", "rows"),
    [
        (SMALL, 8, 256),
        ({**SMALL, "gradient_accumulation_steps": 3}, 8, 768),
        ({**SMALL, "model-parallel-size": 2, "pipe-parallel-size": 2}, 8, 64),
        ({**SMALL, "train_batch_size": 100, "train_micro_batch_size_per_gpu": None}, None, 100),
        ({**SMALL, "global_num_gpus": 4}, None, 128),
        ({}, 64, 2048),
        ({}, None, 1024),
    ],
)
def test_rows_a_step_are_those_of_all_data_parallel_ranks(changes, gpus, rows, write):
    assert read_run(write(changes), gpus=gpus).training.batch_size == rows


@pytest.mark.parametrize(
    ("changes", "gpus", "told"),
    [
        (SMALL, None, "pass the GPUs that it ran on"),
        ({"train-iters": 1000}, None, "pass the GPUs that it ran on"),
        # Of the suite's shape and length, but no batch of the suite's.
        ({"train_micro_batch_size_per_gpu": 64}, None, "pass the GPUs that it ran on"),
        ({"train_micro_batch_size_per_gpu": None}, 32, "train_micro_batch_size_per_gpu"),
        ({"model-parallel-size": 3}, 32, "no multiple of model-parallel-size"),
        ({"train_batch_size": 100}, 32, "32 GPUs take 1024 rows"),
    ],
)
def test_rows_a_step_that_cannot_be_known_are_an_error(changes, gpus, told, write):
    assert told in error_of(write(changes), gpus=gpus)


def test_vocabulary_is_said_read_from_the_tokenizer_or_an_error(write, tmp_path):
    other = {"vocab-file": "/nowhere/own.json"}
    assert "vocab_size" in error_of(write(other))
    assert "vocab_size" in error_of(write({"tokenizer-type": "SPMTokenizer"}))
    config = read_run(write(other), vocab_size=1000)
    assert config.model is not None
    assert config.model.vocab_size == 1024
    file = tmp_path / "own.json"
    pair = {"type": "WordLevel", "vocab": {str(i): i for i in range(130)}, "unk_token": "0"}
    file.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": pair}))
    config = read_run(write({"vocab-file": str(file)}))
    assert config.model is not None
    assert (config.model.vocab_size, config.tokenizer) == (256, str(file))
    file.write_text("{}")
    assert "own.json is no tokenizer" in error_of(write({"vocab-file": str(file)}))


# What is only told.


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"fp16": {"enabled": True, "initial_scale_power": 12, "hysteresis": 3}},
         "fp16: hysteresis: 3"),
        ({"fp16": {"enabled": True, "initial_scale_power": 12, "loss_scale": 128}},
         "fp16: loss_scale: 128"),
        ({"fp16": {"enabled": True}}, "fp16: initial_scale_power: 32, the default"),
        ({"attention-softmax-in-fp32": True}, "attention-softmax-in-fp32: True"),
        ({"data-impl": "lazy"}, "data-impl: 'lazy'"),
        ({"gas": 4}, "gas: 4"),
        ({"precision": "fp32"}, "precision: 'fp32'"),
        ({"keep-last-n-checkpoints": 4}, "keep-last-n-checkpoints: 4"),
        ({"checkpoint-factor": None}, "checkpoint-factor: not set"),
        ({"override-lr-scheduler": True}, "override-lr-scheduler: True"),
        ({"lr": 1.0, "world-size": 3}, "lr, world-size: "),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1e-3, "momentum": 0.0}}},
         "optimizer: momentum"),
    ],
)  # fmt: skip
def test_what_is_done_otherwise_is_listed(changes, start, write):
    before = set(neox_config.read(write()).unhonoured)
    neox = neox_config.read(write(changes))
    assert listed(neox.unhonoured, start) not in before


def test_nothing_but_layout_and_rotary_angles_is_listed_for_the_suites_files(write):
    starts = {item.split(",")[0].split(":")[0] for item in neox_config.read(write()).unhonoured}
    assert starts == {"rotary angles", "pipe-parallel-size"}


def test_written_config_is_the_run_and_its_header_lists_what_is_not_done(write, tmp_path):
    neox = neox_config.read(write({"dropout": "a\nb # c"}, name="pythia-6.9b"))
    text = neox_config.to_yaml(neox)
    out = tmp_path / "out.yaml"
    out.write_text(text, encoding="utf-8")
    assert configs.load(out) == configs.from_dict(neox.run)
    header = [line for line in text.splitlines() if line.startswith("#")]
    said = " ".join(line.removeprefix("# ").strip() for line in header)
    assert all(" ".join(item.split()) in said for item in neox.unhonoured + neox.warnings)
    assert "pythia-6.9b.yml" in header[0]
    assert max(map(len, header[1:])) <= 100
