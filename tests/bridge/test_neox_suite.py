"""The suite's own training files: what they give, and what is wrong with them."""

from pathlib import Path

import pytest
import yaml
from neox_files import NAMES, ROOT, UPSTREAM, error_of, listed, upstream

from pythia_jax import configs
from pythia_jax.bridge import neox_config
from pythia_jax.configs import ConfigError

OURS = {
    # Ours lie in the folder one starts in; there is no test split, and the shuffled Pile was
    # published as rows.
    "data": ("train", "validation", "test"),
    # Tokens are there already; a tokenizer is only wanted to show text.
    "": ("tokenizer",),
    # TPUs have no float16.
    "training": ("precision", "gradient_accumulation", "remat"),
    # A state of the largest takes too much room for 154 of them.
    "checkpoint": ("archive",),
}
"""What our configs choose for themselves, by section."""


def comparable(config):
    values = configs.to_dict(config)
    for section, keys in OURS.items():
        for key in keys:
            (values[section] if section else values).pop(key)
    return values


def agrees_with_shipped(path):
    theirs = configs.from_dict(neox_config.read(path).run)
    ours = configs.load(ROOT / "configs" / f"{path.stem}.yaml")
    assert comparable(theirs) == comparable(ours)
    for name in ("train", "validation"):
        (prefix,), (own,) = getattr(theirs.data, name), getattr(ours.data, name)
        assert Path(prefix).name == Path(own).name


@pytest.mark.parametrize("name", NAMES)
def test_shipped_config_equals_what_its_upstream_file_gives(name, write):
    agrees_with_shipped(write(name=name))


@pytest.mark.parametrize("path", sorted(UPSTREAM.glob("*.yml")), ids=lambda path: path.stem)
def test_shipped_config_equals_what_the_real_upstream_file_gives(path, tmp_path):
    text = path.read_text(encoding="utf-8")
    if path.stem == "pythia-12b":
        assert "line 19: a comma is missing after the value of 'attention-config'" in error_of(path)
        text = text.replace('[[["flash"], 36]]\n', '[[["flash"], 36]],\n')
    mended = tmp_path / path.name
    mended.write_text(text, encoding="utf-8")
    agrees_with_shipped(mended)
    # The facts above are those of the file, up to what is neither mapped nor decides anything.
    ours, theirs = upstream(path.stem), yaml.safe_load(text)
    plain = ("zero_optimization", "num_workers", "checkpoint-activations", "partition-activations")
    plain += ("vocab-file", "launcher", "deepspeed_slurm")
    for values in (ours, theirs):
        for key in plain:
            values.pop(key, None)
    assert ours == theirs


V0 = {
    "160m": {"train-iters": 71_500, "lr-decay-iters": 71_250, "checkpoint-factor": 500},
    "410m": {"train-iters": 71_500, "lr-decay-iters": 71_250, "checkpoint-factor": 500},
    "1.4b": {"train-iters": 71_500, "lr-decay-iters": 71_250, "checkpoint-factor": 500},
    "2.8b": {},
    "6.9b": {"min_lr": None},
    "12b": {"min_lr": None},
}


@pytest.mark.parametrize("size", V0)
def test_file_of_the_suites_first_version_is_the_recipe_pythia_v0(size, write):
    path = write(V0[size], drop=("extra-save-iters",), name=f"pythia-{size}")
    theirs = configs.to_dict(configs.from_dict(neox_config.read(path).run))
    ours = configs.to_dict(configs.from_dict({"recipe": "pythia_v0", "model": {"size": size}}))
    for section in ("model", "optimizer"):
        assert theirs[section] == ours[section]
    for key in ("steps", "batch_size"):
        assert theirs["training"][key] == ours["training"][key]
    for key in ("every", "extra_steps"):
        assert theirs["checkpoint"][key] == ours["checkpoint"][key]


def test_file_that_lacks_a_comma_is_told_where(tmp_path):
    path = tmp_path / "pythia-12b.yml"
    path.write_text(
        '{\n  # a comment\n  "num-layers": 36,\n  "attention-config": [[["flash"], 36]]\n\n'
        '  "bias-gelu-fusion": true,\n}\n'
    )
    message = error_of(path)
    assert "line 4: a comma is missing after the value of 'attention-config'" in message
    assert "line 6 begins a new entry" in message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"a": {"b": 1\n "c": 2}}', "line 1: a comma is missing after the value of 'b'"),
        ('{"a": "b"\n\n "c": 2}', "line 1: a comma is missing after the value of 'a'; line 3"),
        ('{"a": {"b": 1}\n "c": 2}', "line 1: a comma is missing after the value of 'a'"),
        ('{"a": ["b"\n "c"]}', "line 1: a comma is missing after what stands there"),
        ('{"a": 1', "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ('{"a": 1, "a": 2}', "stands twice"),
        ("- 1", "expected sections of keys"),
    ],
)
def test_malformed_file_is_one_error_that_says_what_is_wrong_where(text, told, tmp_path):
    path = tmp_path / "bad.yml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        neox_config.read(path)
    assert told in str(error.value)
    assert str(error.value).startswith(str(path))


def test_file_that_is_not_there_is_one_error(tmp_path):
    assert "no such" in error_of(tmp_path / "nothing.yml")


# 12b-deduped's file since May 2025: layers and heads in each other's place, flash for 36 layers.
SWAPPED = {"num-layers": 40, "num-attention-heads": 36, "attention-config": [[["flash"], 36]]}


def test_file_with_layers_and_heads_swapped_says_so(write):
    message = error_of(write(SWAPPED, name="pythia-12b-deduped"))
    assert "num-attention-heads: 36: 36 heads do not divide hidden-size 5120" in message
    assert "the suite's 12b has num-layers 36 and num-attention-heads 40: the two are swapped" in (
        message
    )
    assert "it is for 36 layers, and num-layers is 40" in message
    assert "gpus" not in message


def test_layers_and_heads_swapped_where_both_are_possible_is_a_warning(write):
    own = {"num-layers": 7, "num-attention-heads": 16, "attention-config": None}
    neox = neox_config.read(write(own, name="pythia-1b"), gpus=64)
    assert not [warning for warning in neox.warnings if "swapped" in warning]
    swapped = {"num-layers": 8, "num-attention-heads": 16, "attention-config": None}
    neox = neox_config.read(write(swapped, name="pythia-1b"))
    told = listed(neox.warnings, "num-attention-heads: 16")
    assert "1b has num-layers 16 and num-attention-heads 8: the two are swapped" in told


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("pythia-1b", ("1b: the training file says fp16", "asks for flash attention")),
        ("pythia-14m", ("the folder says deduplicated",)),
        ("pythia-31m", ("the folder says deduplicated",)),
        ("pythia-6.9b", ("the training file sets no initializer",)),
        ("pythia-12b-deduped", ("the training file sets no initializer",)),
        ("pythia-70m", ()),
        ("pythia-160m-deduped", ()),
    ],
)
def test_known_faults_of_a_training_file_are_warned_of(name, told, write):
    faults = [w for w in neox_config.read(write(name=name)).warnings if "the suite's" in w]
    assert len(faults) == len(told)
    for words in told:
        assert any(words in fault for fault in faults)


def test_fault_that_the_file_does_not_have_is_not_warned_of(write):
    sound = {"fp16": {"type": "bfloat16"}, "attention-config": [[["global"], 16]]}
    neox = neox_config.read(write(sound, name="pythia-1b"))
    assert neox.run["training"]["precision"] == "bfloat16"
    assert not [warning for warning in neox.warnings if "the suite's" in warning]
    assert "bfloat16" in listed(neox.unhonoured, "rotary angles")


# Spelling, files, and what is not known.
