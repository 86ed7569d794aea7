"""`generate`: to the terminal as text comes, and from file to file through kills."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from click.testing import Result
from command_line import refused, run
from reference import random_params
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import pythia_jax as pj
from pythia_jax import prompts, sharding
from pythia_jax.bridge.model import Model
from pythia_jax.cli.generate import Typed
from pythia_jax.configs import MeshConfig, ModelConfig
from pythia_jax.files import locked

CONFIG = ModelConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=260,
    max_position_embeddings=128,
)  # fmt: skip
LINES = [
    {"prompt": "def f(", "id": "a"},
    {"tokens": [5, 6, 7, 8], "id": "b", "nested": {"x": [1.5, None, "é🙂"]}},
    {"id": "c", "prompt": "ünï 🙂"},
    {"prompt": "x"},
]
ROOT = Path(pj.__file__).parents[1]
GREEDY: dict[str, Any] = {"temperature": 0.0, "show_progress": False}


def byte_tokenizer() -> Tokenizer:
    """A token for each byte, the end of a document at 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0, **{letter: i for i, letter in enumerate(alphabet, 1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


@pytest.fixture(scope="module", autouse=True)
def mesh() -> Iterator[None]:
    """That of the command, so that programs are compiled once."""
    with jax.set_mesh(sharding.make_mesh(MeshConfig())):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, whose greedy text is letters without an end, on disk."""
    files = {"tokenizer.json": byte_tokenizer().to_str().encode()}
    params = random_params(CONFIG, seed=3)
    letters = (np.arange(CONFIG.vocab_size) > 0) & (np.arange(CONFIG.vocab_size) < 95)
    params["embed_out"]["kernel"] *= letters
    path = tmp_path_factory.mktemp("generate") / "hf"
    pj.save_hf(Model(params, CONFIG, files), path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return pj.load(folder)


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    return written(tmp_path / "prompts.jsonl", LINES)


def written(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def done(*arguments: object) -> Result:
    result = run("generate", *arguments)
    assert result.exit_code == 0, result.output
    return result


def text_of(model: Model, tokens: list[int]) -> str:
    assert model.tokenizer is not None
    return model.tokenizer.decode(tokens)


def greedy(model: Model, *given: str | list[int], **how: Any) -> list[list[int]]:
    return pj.generate(model, given, temperature=0.0, **how)


def test_the_terminal_has_the_prompt_and_its_greedy_text_and_nothing_else(
    folder: Path, model: Model
) -> None:
    (new,) = greedy(model, "def f(", max_new_tokens=24)
    result = done(folder, "def f(", "--max-new-tokens", 24)
    assert (result.stdout, result.stderr) == ("def f(" + text_of(model, new) + "\n", "")


def test_a_seed_is_a_text(folder: Path) -> None:
    def sampled(seed: int) -> str:
        return done(folder, "def f(", "--temperature", 1.2, "--top-k", 50, "--seed", seed).stdout

    assert sampled(1) == sampled(1) != sampled(2)


def test_no_new_tokens_is_the_prompt(folder: Path) -> None:
    assert done(folder, "def f(", "--max-new-tokens", 0).stdout == "def f(\n"


def test_log_probabilities_are_told_token_by_token_beside_the_text(
    folder: Path, model: Model
) -> None:
    plain = done(folder, "def f(")
    result = done(folder, "def f(", "--logprobs")
    assert result.stdout == plain.stdout
    *lines, total = [line.split(maxsplit=2) for line in result.stderr.splitlines()]
    (new,) = greedy(model, "def f(")
    assert [int(line[1]) for line in lines] == new
    assert [json.loads(line[2]) for line in lines] == [text_of(model, [token]) for token in new]
    assert all(-20 < float(line[0]) < 0 for line in lines)
    assert float(total[0]) == pytest.approx(sum(float(line[0]) for line in lines), abs=2e-3)
    assert total[1:] == ["nats", "in 20 tokens"]


def test_text_comes_as_it_is_made_whole_characters_at_a_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = byte_tokenizer()
    text = "aé🙂日b"
    typed, seen = Typed("» ", tokenizer), []
    tokens = tokenizer.encode(text).ids
    for token in tokens:
        typed.add([token])
        seen.append(capsys.readouterr().out)
    assert seen == ["» a", "", "é", "", "", "", "🙂", "", "", "日", "b"]
    typed.end(text)
    assert capsys.readouterr().out == "\n"
    # A character that never becomes whole is shown for what it is, at the end.
    typed = Typed("» ", tokenizer)
    typed.add(tokens[:2])
    typed.end("a\ufffd")
    assert capsys.readouterr().out == "» a\ufffd\n"


def test_a_stop_string_ends_the_text_before_it(folder: Path, model: Model) -> None:
    whole = done(folder, "def f(", "--max-new-tokens", 24).stdout[6:-1]
    stop = whole[8:10]
    stopped = done(folder, "def f(", "--max-new-tokens", 24, "--stop", "@@", "--stop", stop)
    assert stopped.stdout == "def f(" + whole[: whole.index(stop)] + "\n"


def test_rows_are_those_of_their_prompts_beside_what_their_lines_had(
    folder: Path, model: Model, asked: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    result = done(folder, "--file", asked, "--out", out, "--logprobs")
    assert result.stdout == "" and "4 rows" in result.stderr and str(out) in result.stderr
    given = [line.get("tokens") or line["prompt"] for line in LINES]
    made = greedy(model, *given)
    for line, row, new in zip(LINES, rows_of(out), made, strict=True):
        assert list(row) == [*line, "continuation", "new_tokens", "ended", "logprobs"]
        assert {key: row[key] for key in line} == line
        assert (row["new_tokens"], row["continuation"]) == (new, text_of(model, new))
        assert row["ended"] == ("eod" if new[-1] == 0 else "length")
        assert len(row["logprobs"]) == len(new) and max(row["logprobs"]) < 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "prompts.jsonl", "out.jsonl", ".out.jsonl.lock",
    }  # fmt: skip


def test_without_a_tokenizer_there_are_tokens_alone(
    model: Model, asked: Path, tmp_path: Path
) -> None:
    bare = Model(model.params, CONFIG)
    with pytest.raises(ValueError, match=r"line 1: .*has no tokenizer; give tokens; line 3"):
        prompts.generate_file(bare, asked, tmp_path / "out")
    ids = written(tmp_path / "ids.jsonl", [{"tokens": [5, 6, i]} for i in range(4)])
    prompts.generate_file(bare, ids, tmp_path / "out", **GREEDY)
    assert [list(row) for row in rows_of(tmp_path / "out")] == [
        ["tokens", "new_tokens", "ended"]
    ] * 4


MANY = [{"prompt": "def f(" + "x" * (i % 7), "i": i} for i in range(60)]
SAMPLED = ("--temperature", 1.0, "--seed", 5, "--max-new-tokens", 60, "--batch-size", 3)


def killed(folder: Path, asked: Path, out: Path, rows: int) -> None:
    """Start the command, and kill it when so many rows are on the disk."""
    partial = out.with_name(f"{out.name}.partial")
    words = [folder, "--file", asked, "--out", out, *SAMPLED]
    process = subprocess.Popen(
        [sys.executable, "-m", "pythia_jax", "generate", *map(str, words)],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None:
        if partial.exists() and partial.read_bytes().count(b"\n") > rows:
            process.kill()
            break
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()


def test_killed_and_gone_on_with_is_the_same_file_to_the_byte(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = written(tmp_path / "prompts.jsonl", MANY)
    caplog.set_level(logging.INFO, "pythia_jax")
    whole, out = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    partial = tmp_path / "killed.jsonl.partial"
    done(folder, "--file", asked, "--out", whole, *SAMPLED)
    killed(folder, asked, out, 3)
    # What a kill in the middle of writing a row leaves.
    kept = partial.read_bytes().rstrip(b"\n").split(b"\n")
    partial.write_bytes(b"\n".join(kept)[:-9])
    there = len(kept) - 2
    assert 0 < there < len(MANY) - 1
    result = done(folder, "--file", asked, "--out", out, *SAMPLED)
    assert f"{there} of 60 rows are there; going on" in caplog.text
    assert f"60 rows, {there} of them there before" in result.stderr
    assert out.read_bytes() == whole.read_bytes()
    assert not partial.exists()


def test_what_a_kill_left_of_writing_the_file_goes_and_nothing_else(
    model: Model, asked: Path, tmp_path: Path
) -> None:
    other = tmp_path / ".out.jsonl.999.partial"  # of a file that is another's
    for path in (other, tmp_path / ".out.999.partial"):
        path.write_text("half")
    prompts.generate_file(model, asked, tmp_path / "out")
    assert other.exists() and not (tmp_path / ".out.999.partial").exists()


def test_a_line_whose_logits_are_no_numbers_is_named(
    model: Model, asked: Path, tmp_path: Path
) -> None:
    params = jax.tree.map(lambda x: x * np.float32(np.nan), model.params)
    with pytest.raises(ValueError, match=r": line 3: the log-probability of new token 0 is no"):
        prompts.generate_file(replace(model, params=params), asked, tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("out.jsonl*"))


def test_lines_of_one_prompt_are_sampled_apart_and_again_the_same(
    folder: Path, tmp_path: Path
) -> None:
    asked, made = written(tmp_path / "prompts.jsonl", [MANY[6]] * 6), []
    for i, seed in enumerate((5, 5, 6)):
        out = tmp_path / str(i)
        done(folder, "--file", asked, "--out", out, *SAMPLED, "--seed", seed)
        made.append([row["continuation"] for row in rows_of(out)])
    assert made[0] == made[1]
    assert len({*made[0], *made[2]}) == 12


@pytest.fixture
def begun(model: Model, asked: Path, tmp_path: Path) -> Path:
    """OUT, of which a stop has left two rows."""
    out = tmp_path / "out.jsonl"
    real = prompts.continuations

    def stopped(*of: Any, **how: Any) -> Any:
        made = real(*of, **how)
        yield next(made)
        yield next(made)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "continuations", stopped)
        with pytest.raises(KeyboardInterrupt):
            prompts.generate_file(model, asked, out, **GREEDY)
    assert len(rows_of(tmp_path / "out.jsonl.partial")) == 3
    return out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"temperature": 0.5, "stop": ("x",)}, r"temperature was 0.0, is 0.5; stop was \[\], is"),
    ],
)
def test_what_was_begun_otherwise_is_not_gone_on_with(
    model: Model, asked: Path, begun: Path, settings: dict[str, Any], message: str
) -> None:
    partial = begun.with_name("out.jsonl.partial")
    before = partial.read_bytes()
    with pytest.raises(FileExistsError, match=f"out.jsonl.partial holds other rows: {message}"):
        prompts.generate_file(model, asked, begun, **{**GREEDY, **settings})
    assert partial.read_bytes() == before and not begun.exists()


def test_other_weights_or_prompts_are_not_gone_on_with(
    folder: Path, model: Model, asked: Path, begun: Path
) -> None:
    other = Model(random_params(CONFIG, seed=4), CONFIG, model.tokenizer_files)
    with pytest.raises(FileExistsError, match="weights is not the same"):
        prompts.generate_file(other, asked, begun, **GREEDY)
    narrow = pj.load(folder, dtype="bfloat16")
    with pytest.raises(FileExistsError, match="dtype was 'float32', is 'bfloat16'; weights is not"):
        prompts.generate_file(narrow, asked, begun, **GREEDY)
    written(asked, [*LINES, {"prompt": "y"}])
    with pytest.raises(FileExistsError, match="prompts is not the same"):
        prompts.generate_file(model, asked, begun, **GREEDY)


def test_rows_at_a_time_may_change_on_the_way(
    model: Model, asked: Path, begun: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts.generate_file(model, asked, begun, batch_size=2, **GREEDY)
    assert "rows_together was 16, is 2" in caplog.text
    prompts.generate_file(model, asked, tmp_path / "whole.jsonl", **GREEDY)
    assert begun.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("settings", [{"stop": ("",)}, {"temperature": -1}, {"batch_size": 0}])
def test_refused_settings_leave_nothing(
    model: Model, asked: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
        prompts.generate_file(model, asked, tmp_path / "out.jsonl", **settings)
    assert not list(tmp_path.glob("out.jsonl*"))


@pytest.mark.parametrize("content", [b"", b"hello\n", b"{}\n", b'{"settings": 1, "computed": 2}\n'])
def test_a_file_that_is_not_ours_is_left_alone(
    model: Model, asked: Path, tmp_path: Path, content: bytes
) -> None:
    partial = tmp_path / "out.jsonl.partial"
    partial.write_bytes(content)
    with pytest.raises(ValueError, match="was not written by generate; move it away"):
        prompts.generate_file(model, asked, tmp_path / "out.jsonl")
    assert partial.read_bytes() == content


def test_one_process_at_a_time_writes_a_file(model: Model, asked: Path, tmp_path: Path) -> None:
    with (
        locked(tmp_path / ".out.jsonl.lock"),
        pytest.raises(RuntimeError, match="another process is writing this file"),
    ):
        prompts.generate_file(model, asked, tmp_path / "out.jsonl")


def test_prompts_that_change_meanwhile_are_told(
    model: Model, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, out = prompts.continuations, tmp_path / "out.jsonl"

    def changing(*of: Any, **how: Any) -> Any:
        yield from real(*of, **how)
        written(asked, LINES[::-1])

    with monkeypatch.context() as patch:
        patch.setattr(prompts, "continuations", changing)
        with pytest.raises(ValueError, match="has changed while it was generated from"):
            prompts.generate_file(model, asked, out, **GREEDY)
    assert not out.exists()
    written(asked, LINES)
    found = prompts.generate_file(model, asked, out, **GREEDY)
    assert (found.rows, found.before, found.tokens) == (4, 4, 0)


BAD = """\
{"prompt": "fine"}
{"prompt": ""}
{"prompt": "torn
["prompt"]

{"prompt": 3}
{"tokens": [1, true]}
{"tokens": [1, 260]}
"""
WORSE = [
    {"tokens": [-1]},
    {"text": "x"},
    {"prompt": "x", "tokens": [1]},
    {"prompt": "x", "ended": "here"},
    {"prompt": "\ud800"},
    {"prompt": "x" * 109},
]


def test_bad_lines_are_named_by_number_before_anything_is_read_of_the_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "load", None)
    bad, out = tmp_path / "bad.jsonl", tmp_path / "out.jsonl"
    bad.write_text(BAD)
    output = refused("generate", folder, "--file", bad, "--out", out)
    for said in (
        f"{bad}: line 2: it is empty",
        "line 3: not JSON: ",
        "line 4: not a JSON object",
        "line 6: prompt is no text",
        "line 7: tokens is no list of token ids; and 1 more",
    ):
        assert said in output
    written(bad, WORSE)
    output = refused("generate", folder, "--file", bad, "--out", out)
    for said in (
        "line 1: token -1 is not in the vocabulary of 260",
        "line 2: give one of prompt (text) and tokens (ids)",
        "line 3: give one of prompt",
        "line 4: has the key ended, which is written here",
        r"line 5: prompt is no text: '\ud800' is a lone surrogate; and 1 more",
    ):
        assert said in output
    written(bad, WORSE[-1:])
    told = "line 1: 109 tokens and 20 new ones do not fit the context of 128"
    assert told in refused("generate", folder, "--file", bad, "--out", out)
    bad.write_text("\n")
    assert "holds no prompts" in refused("generate", folder, "--file", bad, "--out", out)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]
    assert "/dev/null: is no file" in refused(
        "generate", folder, "--file", "/dev/null", "--out", out
    )


def test_a_file_that_is_there_is_not_written_over(
    folder: Path, asked: Path, tmp_path: Path
) -> None:
    before = asked.read_bytes()
    output = refused("generate", folder, "--file", asked, "--out", asked)
    assert f"{asked}: is there already" in output and asked.read_bytes() == before
    nowhere = tmp_path / "nowhere" / "out.jsonl"
    assert "there is no folder" in refused("generate", folder, "--file", asked, "--out", nowhere)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of PROMPT and --file FILE"),
        (["x", "--file", "FILE", "--out", "o"], "give one of PROMPT and --file FILE"),
        (["--file", "FILE"], "--file goes with --out FILE"),
        (["--file", "absent.jsonl", "--out", "o"], "'absent.jsonl' does not exist"),
        (["x", "--out", "o"], "--out goes with --file"),
        (["x", "--batch-size", "4"], "--batch-size goes with --file"),
        (["x", "--temperature", "-1"], "--temperature"),
        (["x", "--temperature", "nan"], "temperature must be 0 (greedy), or finite"),
        (["a\udcff"], "prompt 0: prompt is no text: '\\udcff' is a lone surrogate"),
        (["x", "--top-k", "5"], "--top-k and --top-p go with --temperature"),
        (["x", "--top-p", "0"], "--top-p"),
        (["x", "--repetition-penalty", "0"], "--repetition-penalty"),
        (["x", "--tensor", "3"], "tensor 3 does not fit 1 device"),
        (["x", "--tensor", "0"], "mesh.tensor: 0"),
        ([""], "prompt 0: it is empty"),
        (["x" * 128], "128 tokens and 20 new ones do not fit"),
    ],
)
def test_bad_input_is_one_clear_error_and_no_text(
    folder: Path, asked: Path, arguments: list[str], message: str
) -> None:
    words = [str(asked) if word == "FILE" else word for word in arguments]
    result = run("generate", folder, *words)
    assert result.exit_code in (1, 2) and result.stdout == ""
    assert message in refused("generate", folder, *words)


ON_EIGHT = """
import sys, jax
from pythia_jax.cli import main
assert jax.device_count() == 8
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_on_eight_devices_the_text_is_the_same(folder: Path, asked: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    cut = ["--fsdp", "2", "--tensor", "2"]

    def on_eight(*words: object) -> str:
        command = [sys.executable, "-c", ON_EIGHT, "generate", *map(str, words), *cut]
        ran = subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE)
        return ran.stdout.decode()

    assert on_eight(folder, "def f(") == done(folder, "def f(").stdout
    one, eight = tmp_path / "one.jsonl", tmp_path / "eight.jsonl"
    done(folder, "--file", asked, "--out", one)
    assert on_eight(folder, "--file", asked, "--out", eight) == ""
    assert eight.read_bytes() == one.read_bytes()
