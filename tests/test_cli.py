"""The commands as their users type them; the errors they get."""

import dataclasses
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
import pytest
from command_line import refused, run
from reference import TINY, random_params
from tokenizers import Tokenizer, models, pre_tokenizers

import pythia_jax as pj
from pythia_jax import configs, data
from pythia_jax.bridge import neox_config
from pythia_jax.bridge.model import Model
from pythia_jax.cli import main
from pythia_jax.cli.bridge import tell
from pythia_jax.data.dump import dump


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """One token a letter, the end of a document at 0."""
    vocab = {"<|endoftext|>": 0, **{c: i + 1 for i, c in enumerate("abcdefghijklmnopqrstuvwxyz ")}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.fixture
def config(tmp_path: Path, tokenizer: Path) -> Path:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(30):
        (texts / f"{i}.txt").write_text("the quick brown fox jumps over the lazy dog " * (i + 1))
    result = run("data", "tokenize", texts, "--out", tmp_path / "corpus", "--tokenizer", tokenizer,
                 "--append-eod")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "30 documents" in result.output
    path = tmp_path / "run.yaml"
    path.write_text(f"""
name: tiny
model: {{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, vocab_size: 28, \
max_position_embeddings: 64}}
data: {{train: [{tmp_path}/corpus], sequence_length: 32}}
tokenizer: {tokenizer}
training: {{steps: 6, batch_size: 4, precision: float32, remat: none}}
checkpoint: {{directory: {tmp_path}/run, extra_steps: [0, 1]}}
""")
    return path


def test_help_names_every_command() -> None:
    output = run("--help").output
    for command in ("quickstart", "suite", "train", "data", "convert", "generate"):
        assert command in output
        assert run(command, "--help").exit_code == 0


def test_suite_shows_sizes_counts_rates_and_faults() -> None:
    output = run("suite").output
    for text in ("14,067,712", "11,327,027,200", "0.00025", "pythia#205", "154"):
        assert text in output


def test_train_stop_go_on_generate_and_convert(config: Path, tmp_path: Path) -> None:
    assert "checkpoint 0" in run("train", config, "--stop-at", 0).output
    assert "checkpoint 3" in run("train", config, "--stop-at", 3).output
    result = run("train", config)
    assert result.exit_code == 0 and "checkpoint 6" in result.output
    text = run("generate", tmp_path / "run", "the q", "--max-new-tokens", 5)
    assert text.exit_code == 0 and text.output.startswith("the q")
    early = run("generate", tmp_path / "run", "the q", "--step", 1)
    assert early.exit_code == 0
    made = run("convert", tmp_path / "run", tmp_path / "hf", "--dtype", "bfloat16")
    assert made.exit_code == 0, made.output
    model = pj.load(tmp_path / "hf")
    assert model.stored_dtype == "bfloat16" and model.tokenizer is not None
    assert run("generate", tmp_path / "hf", "the q").exit_code == 0


def test_any_kind_of_checkpoint_is_converted_to_any_other(config: Path, tmp_path: Path) -> None:
    assert run("train", config, "--stop-at", 1).exit_code == 0
    road = [("hf", "hf"), ("neox", "neox"), ("orbax", "orbax"), ("hf", "back")]
    source = tmp_path / "run"
    for kind, name in road:
        done = run("convert", source, tmp_path / name, "--to", kind)
        assert done.exit_code == 0, done.output
        source = tmp_path / name
    for file in ("model.safetensors", "config.json"):
        there, back = (tmp_path / name / file for name in ("hf", "back"))
        assert there.read_bytes() == back.read_bytes()


def test_a_tokenizer_is_given_to_what_has_none_and_not_lost(
    config: Path, tokenizer: Path, tmp_path: Path
) -> None:
    assert run("train", config, "--stop-at", 1).exit_code == 0
    assert run("convert", tmp_path / "run", tmp_path / "neox", "--to", "neox").exit_code == 0
    assert run("convert", tmp_path / "run", tmp_path / "hf").exit_code == 0
    assert "would be lost" in refused("convert", tmp_path / "neox", tmp_path / "hf")
    given = ("--tokenizer", tokenizer)
    assert run("convert", tmp_path / "neox", tmp_path / "hf", *given).exit_code == 0
    assert run("generate", tmp_path / "hf", "the q").exit_code == 0


def test_a_run_begins_with_other_weights(config: Path, tmp_path: Path) -> None:
    assert run("train", config).exit_code == 0
    began = run("train", config, "--from", tmp_path / "run", "--step", 1, "--optimizer-state",
                "checkpoint", "--checkpoint.directory", tmp_path / "more")  # fmt: skip
    assert began.exit_code == 0, began.output
    saved = configs.load(tmp_path / "more" / "config.yaml").initialize_from
    assert saved is not None and (saved.step, saved.optimizer_state) == (1, "checkpoint")
    first, second = (pj.load(tmp_path / name, step=6).params for name in ("run", "more"))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.array_equal(a, b)


NEOX = """
{
  "num-layers": 2, "hidden-size": 32, "num_attention_heads": 2, "seq-length": 32,
  "max-position-embeddings": 32, "pos-emb": "rotary", "rotary-pct": 0.5, "no-weight-tying": true,
  "gpt-j-residual": true, "bias-gelu-fusion": true, "hidden-dropout": 0, "attention-dropout": 0,
  "optimizer": {"type": "Adam", "params": {"lr": 0.001, "betas": [0.9, 0.95], "eps": 1.0e-8}},
  "min_lr": 0.0001, "weight-decay": 0.1, "gradient_clipping": 1.0, "lr-decay-style": "cosine",
  "warmup": 0.01, "fp16": {"enabled": true, "loss_scale": 0, "initial_scale_power": 12},
  "train_micro_batch_size_per_gpu": 4, "train-iters": 6, "lr-decay-iters": 6,
  "make_vocab_size_divisible_by": 28, "data-path": "CORPUS", "split": "100,0,0",
  "eval-interval": 100, "eval-iters": 0, "partition_activations": true,
  "synchronize-each-layer": true,
}
"""


def test_a_gpt_neox_file_is_a_config_and_trains(config: Path, tmp_path: Path) -> None:
    file = tmp_path / "neox.yml"
    file.write_text(NEOX.replace("CORPUS", str(tmp_path / "corpus")))
    known = ("--gpus", 1, "--vocab-size", 28)
    made = run("convert", "--neox-config", file, tmp_path / "ours.yaml", *known)
    assert made.exit_code == 0, made.output
    ours = configs.load(tmp_path / "ours.yaml")
    assert ours.model is not None and ours.model.vocab_size == 28
    assert (ours.training.steps, ours.training.batch_size) == (6, 4)
    trained = run("train", "--from-neox", file, *known, "--training.steps", 2,
                  "--checkpoint.directory", tmp_path / "neox")  # fmt: skip
    assert trained.exit_code == 0, trained.output
    saved = configs.load(tmp_path / "neox" / "config.yaml")
    assert saved.model == ours.model and saved.training.steps == 2
    assert saved.training.precision == "float16"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({}, False),
        ({"training.steps": "2"}, True),
        ({"training.steps": "2", "optimizer.decay-steps": "6"}, False),
    ],
)
def test_a_schedule_that_follows_fewer_steps_than_the_file_s_is_told(
    flags: dict[str, str], told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "neox.yml"
    file.write_text(NEOX)
    tell(neox_config.read(file, gpus=1, vocab_size=28), flags)
    error = capsys.readouterr().err
    assert ("lr-decay-iters (6) would stay as it is: --optimizer.decay-steps 6" in error) == told


def test_dotted_flags_set_any_key(config: Path, tmp_path: Path) -> None:
    result = run("train", config, "--training.steps", 2, "--optimizer.peak-learning-rate=2e-3",
                 "--checkpoint.directory", tmp_path / "other")  # fmt: skip
    assert result.exit_code == 0, result.output
    saved = configs.load(tmp_path / "other" / "config.yaml")
    assert saved.training.steps == 2 and saved.optimizer.peak_learning_rate == 2e-3


def test_batches_are_dumped_with_their_digest(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "batches.npy"
    result = run("data", "batches", config, "--start", 2, "--stop", 5, "--out", out)
    rows = np.load(out)
    batches = data.batches(configs.load(config))
    expected = np.concatenate([batches[step] for step in (2, 3, 4)])
    np.testing.assert_array_equal(rows, expected)
    assert hashlib.sha256(expected.astype("<i4").tobytes()).hexdigest() in result.output


def test_a_dump_that_fails_leaves_nothing_and_what_was_there_stays(
    config: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "x.npy"
    # Ids of the corpus lie beyond this vocabulary, which shows when the batches are read.
    small = ("data", "batches", config, "--start", 0, "--stop", 6, "--out", out,
             "--model.vocab-size", 3)  # fmt: skip
    assert "model.vocab_size" in refused(*small)
    assert list(out.parent.iterdir()) == []
    out.write_text("earlier")
    assert "model.vocab_size" in refused(*small)
    assert out.read_text() == "earlier" and list(out.parent.iterdir()) == [out]
    absent = tmp_path / "absent" / "x.npy"
    assert "no folder" in refused("data", "batches", config, "--start", 0, "--stop", 1, "--out",
                                  absent)  # fmt: skip


def test_a_dump_broken_off_half_way_leaves_nothing(config: Path, tmp_path: Path) -> None:
    class Broken(data.Batches):
        def read(self, step: int, rows: Any) -> Any:
            if step == 4:
                raise OSError("the disk went away")
            return super().read(step, rows)

    whole = data.batches(configs.load(config))
    broken = Broken(**{f.name: getattr(whole, f.name) for f in dataclasses.fields(whole)})
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="went away"):
        dump(broken, 0, 6, tmp_path / "out" / "x.npy")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "absent.yaml"], "absent.yaml: there is no such config file"),
        (["train", "CONFIG", "--training.stepz", "3"], "nearest known one is 'steps'"),
        (["train", "CONFIG", "--training.steps", "0"], "training.steps: 0 is not possible"),
        (["train", "CONFIG", "--training.steps"], "needs a value"),
        (["train", "CONFIG", "spurious"], "spurious"),
        (["train", "CONFIG", "--stop-at", "-3"], "stop_at: -3 is no step"),
        (["train", "--training.steps", "3", "CONFIG"], "train CONFIG --training.steps ..."),
        (["train", "--name=x", "CONFIG"], "CONFIG comes before its flags"),
        (["train", "CONFIG", "--tokenizer", "gone.json"], "there is no file gone.json"),
        (["train", "CONFIG", "--step", "3"], "--step goes with --from MODEL"),
        (["train", "CONFIG", "--gpus", "3"], "--gpus goes with --from-neox FILE"),
        (["train", "CONFIG", "--from-neox", "x.yml"], "give one of them"),
        (["train"], "Missing argument 'CONFIG'"),
        (["train", "CONFIG", "--from", "x/y/z"], "x/y/z: there is no such folder"),
        (["train", "CONFIG", "--from", "x", "--optimizer-state", "rebuild"], "rebuild:K"),
        (["convert", "absent", "gs://a/b"], "gs://a/b: conversions are written to folders"),
        (["convert", "absent", "out"], "absent: there is no such folder"),
        (["convert", "CONFIG"], "name the folder to write"),
        (
            ["convert", "a", "b", "--to", "orbax", "--max-shard-size", "1MB"],
            "(--max-shard-size) is of conversions to hf, and this is one to orbax; drop it, or",
        ),
        (["convert", "a", "b", "--revisions", "all"], "--push-to ORG/NAME"),
        (["convert", "a", "b", "--neox-config", "c"], "one path is enough"),
        (["convert", "a", "--push-to", "b/c", "--revisions", "1,x"], "0,1000,2000"),
        (["convert", "a", "--push-to", "b/c", "--to", "neox"], "what --to hf writes"),
        (["convert", "a", "--push-to", "b"], "give ORG/NAME"),
        (
            ["convert", "a", "--push-to", "b/c", "--revisions", "all", "--model-parallel", "0"],
            "--model-parallel would mean nothing",
        ),
        (["convert", "a", "b", "--gpus", "0"], "--gpus would mean nothing"),
        (["convert", "a", "--neox-config", "c", "--dtype", "float16"], "--dtype would mean"),
        (["generate", "absent", "x"], "absent: there is no such folder"),
        (["data", "batches", "CONFIG", "--start", "4", "--stop", "9", "--out", "x.npy"], "0 to 6"),
        (
            ["data", "batches", "CONFIG", "--start", "0", "--stop", "1", "--split", "validation",
             "--out", "x.npy"],
            "data.validation",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(config: Path, arguments: list[str], message: str) -> None:
    output = refused(*[str(config) if a == "CONFIG" else a for a in arguments])
    assert message in output


def commands(group: click.Group = main, *above: str) -> Iterator[tuple[str, ...]]:
    """Words that call each of the commands."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *above, name)
        else:
            yield *above, name


def command_of(words: tuple[str, ...]) -> click.Command:
    command: Any = main
    for word in words:
        command = command.commands[word]
    return command


def having(name: str, kind: type[click.Parameter]) -> list[tuple[str, ...]]:
    """Those that take such an option or argument."""
    return [
        words
        for words in commands()
        if any(isinstance(p, kind) and p.name == name for p in command_of(words).params)
    ]


def test_the_table_of_commands_has_each_with_its_own_flags_and_all_that_must_be_given() -> None:
    text = (Path(__file__).parents[1] / "docs" / "commands.md").read_text(encoding="utf-8")
    known, found = set(commands()), set()
    for line in text.partition("\n## ")[0].splitlines():
        above: tuple[str, ...] = ()
        for typed in re.findall("`(.+?)`", line.split(" | ")[0] if line[:3] == "| `" else ""):
            # `term-frequency count …`, and then `plot …` of the same group.
            full = [(*above, *typed.split()), tuple(typed.split())]
            words = next((w for each in full for w in known if each[: len(w)] == w), None)
            if words is None:
                continue  # further flags, or what `evaluate` hands on
            found.add(words)
            above = words[:-1]
            options = [p for p in command_of(words).params if isinstance(p, click.Option)]
            flags = set(re.findall("--[a-z-]+", typed))
            assert flags <= {name for option in options for name in option.opts}, typed
            missing = [o.opts for o in options if o.required and not flags & set(o.opts)]
            assert not missing or typed.endswith("…"), (typed, missing)
    assert found == known


STEPS = {
    words
    for words in having("steps", click.Option)
    if words[0] not in ("attribute", "counterfactual")
}
"""Those to which steps are A:B; the other two take a number."""


@pytest.mark.parametrize("words", sorted(STEPS), ids="-".join)
def test_a_range_of_steps_is_two_numbers_to_every_command(words: tuple[str, ...]) -> None:
    for steps in ("7", "1:2:3", "a:b", ":3"):
        told = refused(*words, "MODEL", "--steps", steps)
        assert f"Invalid value for '--steps': {steps!r}: two numbers, as 2990:3000" in told


def test_no_command_takes_a_flag_for_its_model() -> None:
    for words in having("model", click.Argument):
        told = refused(*words, "--data.seed", 1, "MODEL")
        # Where dotted flags are taken, click cannot know them from a MODEL.
        assert "MODEL comes before its flags" in told or "No such option" in told, words


def test_an_interrupt_is_one_line_and_its_own_exit_status(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pythia_jax.training.trainer.train", interrupted)
    result = run("train", config)
    assert (result.exit_code, result.output) == (130, "Interrupted\n")


def test_a_model_without_a_tokenizer_cannot_be_prompted(tmp_path: Path) -> None:
    pj.save_hf(Model(random_params(TINY), TINY), tmp_path / "hf")
    assert "no tokenizer" in refused("generate", tmp_path / "hf", "hello")
