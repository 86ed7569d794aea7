"""The whole road on one machine: text → tokens → train → resume → evaluate → export → generate.

Everything is the real thing at a small size: the data order, the recipe, the checkpoints and the
exported folder are those of a run on a pod.
"""

import os
import shlex
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import pythia_jax as pj
from pythia_jax import configs
from pythia_jax.bridge.model import Model
from pythia_jax.configs import RunConfig
from pythia_jax.data.tokenize import EOD_TOKEN, read_texts, tokenize_texts
from pythia_jax.training.trainer import jitted_loss, train

HELD_OUT_EVERY = 20
"""One document in so many is held out."""
HELD_OUT_ROWS = 192
"""Of the held-out tokens, from their beginning, that the model is evaluated on at the end."""
MAX_CHARACTERS = 12_000_000
PROMPTS = ("def __init__(self", "import os\n", "    for i in range(")
SUMMARY = "summary.txt"
MARKER = ".quickstart"
"""A file that says whose folder it stands in: only beside it is anything deleted."""


@dataclass(frozen=True)
class Summary:
    """What the quickstart made. Losses are in nats per token, on the same held-out tokens."""

    out: Path
    held_out_loss: float
    bigram_loss: float
    resumed_from: int
    seconds: float
    generated: tuple[tuple[str, str], ...]

    def text(self) -> str:
        run, hf = self.out / "run", self.out / "hf"
        verdict = "below" if self.held_out_loss < self.bigram_loss else "NOT below"
        samples = "\n".join(f"    {prompt!r} → {new!r}" for prompt, new in self.generated)
        program, config = shlex.quote(_program()), shlex.quote(f"{run}/config.yaml")
        longer = shlex.quote(f"{self.out}-longer")
        return f"""
Done in {self.seconds:.0f} s.

  held-out loss   {self.held_out_loss:.3f} nats per token, on the first {HELD_OUT_ROWS} rows
  bigram model    {self.bigram_loss:.3f} on the same tokens: ours is {verdict} it
  resumed         from checkpoint {self.resumed_from}, as if training had never stopped
  generated
{samples}

  {run}/loss.png        the loss curve
  {run}/metrics.jsonl   every logged step; for TensorBoard: {run}/events
  {run}/checkpoints     checkpoints, by step
  {hf}                  the model, for transformers' AutoModelForCausalLM.from_pretrained
  {self.out}/data                tokenizer.json, and the tokens as .bin and .idx

Three commands, the last of some ten minutes, to try next:
  {program} generate {shlex.quote(str(hf))} "def main(" --max-new-tokens 40 --temperature 0.7
  {program} data batches {config} --start 0 --stop 1 --out batch.npy
  {program} train {config} --training.steps 2000 --checkpoint.directory {longer}
"""


def quickstart(
    out: Path = Path("quickstart"),
    text: Sequence[Path] = (),
    *,
    say: Callable[[str], object] = print,
    show_progress: bool = True,
) -> Summary:
    """Walk the whole road in the folder `out`; what an earlier quickstart left there is replaced.

    text: files or folders to learn from; Python's own standard library if none are given.

    Raises FileExistsError if `out` holds something and no quickstart made it, ValueError if there
    is too little text.
    """
    began = time.perf_counter()
    out = Path(out)
    _refuse_foreign(out)

    say("1/6  reading text")
    texts = _read(text)
    _clear(out)  # not before there is something to put in its place
    say(f"     {len(texts):,} documents, {sum(map(len, texts)) / 1e6:.1f} M characters")

    say("2/6  training a tokenizer and writing tokens")
    config = _config(out)
    assert config.model is not None
    tokenizer = train_tokenizer(texts, config.model.vocab_size)
    tokenizer.save(str(out / "data" / "tokenizer.json"))
    held_out = set(range(0, len(texts), HELD_OUT_EVERY))
    for split, chosen in (
        ("train", [t for i, t in enumerate(texts) if i not in held_out]),
        ("validation", [t for i, t in enumerate(texts) if i in held_out]),
    ):
        made = tokenize_texts(chosen, out / "data" / split, tokenizer, append_eod=True)
        say(f"     {split}: {made.documents:,} documents, {made.tokens:,} tokens")

    say("3/6  training, with a stop half-way")
    train(config, stop_at=config.training.steps // 2, show_progress=show_progress)
    result = train(config, show_progress=show_progress)
    assert result.resumed_from is not None

    say("4/6  evaluating on held-out text")
    model_loss, bigram_loss = _evaluate(result.state.params, config)

    say("5/6  exporting to Hugging Face format")
    pj.save_hf(pj.load(result.folder), out / "hf")

    say("6/6  generating from the exported model")
    model = pj.load(out / "hf")
    generated = tuple(zip(PROMPTS, _continue(model, PROMPTS), strict=True))

    summary = Summary(
        out=out,
        held_out_loss=model_loss,
        bigram_loss=bigram_loss,
        resumed_from=result.resumed_from,
        seconds=time.perf_counter() - began,
        generated=generated,
    )
    (out / SUMMARY).write_text(summary.text(), encoding="utf-8")
    return summary


def _refuse_foreign(out: Path) -> None:
    marker = out / MARKER
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not marker.is_file())):
        raise FileExistsError(
            f"{out} holds something that no quickstart made; choose another folder with --out"
        )


def _clear(out: Path) -> None:
    """Make `out`, or, if an earlier quickstart made it, delete what that one left in it."""
    _refuse_foreign(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text(
        "Made by `pythia-jax quickstart`. The next one with the same --out deletes data/, run/, "
        f"hf/ and {SUMMARY} here.\n",
        encoding="utf-8",
    )
    # A killed export leaves hidden folders beside hf.
    for name in ("data", "run", "hf", ".hf.partial*", ".hf.replaced", SUMMARY):
        for part in out.glob(name):
            if part.is_dir() and not part.is_symlink():
                shutil.rmtree(part)
            else:
                part.unlink()
    (out / "data").mkdir()


def _program() -> str:
    """How this program can be called from here: by its name, or by path where PATH lacks it."""
    name = "pythia-jax"
    if shutil.which(name):
        return name
    called = Path(sys.argv[0])
    # Called as a library or with `python -m`: the script lies beside the interpreter.
    path = called if called.stem == name else Path(sys.executable).with_name(name)
    if not path.is_file():
        return name
    path = path.absolute()
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _read(text: Sequence[Path]) -> list[str]:
    """Documents, up to a size that trains in minutes, spread evenly over what there is."""
    if text:
        documents = list(read_texts(text))
    else:
        documents = list(standard_library())
    if len(documents) < 2 * HELD_OUT_EVERY:
        # A few long documents are cut into pieces, so that some can be held out.
        joined = "\n".join(documents)
        size = max(1, len(joined) // (10 * HELD_OUT_EVERY))
        documents = [joined[i : i + size] for i in range(0, len(joined), size)]
    total = sum(map(len, documents))
    if total < 200_000:
        raise ValueError(
            f"{total:,} characters are too little text; give at least 200,000 (more --text paths)"
        )
    keep = min(1.0, MAX_CHARACTERS / total)
    chosen = np.floor(np.arange(len(documents) + 1) * keep)
    return [d for d, a, b in zip(documents, chosen, chosen[1:], strict=False) if b > a]


def standard_library() -> Iterator[str]:
    """The sources of Python's own library, its tests left out, by name."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(folder.rglob("*.py")):
        skipped = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
        if skipped.isdisjoint(path.relative_to(folder).parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield text


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with Pythia's two special tokens in their places."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD_TOKEN, "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _config(out: Path) -> RunConfig:
    # Set as values and not as text, in which a comma or a colon of a path would mean something.
    config = configs.load(shipped_config("quickstart"))
    # The run's config.yaml is of use wherever one stands.
    out = out.absolute()
    train, validation = (str(out / "data" / split) for split in ("train", "validation"))
    return replace(
        config,
        data=replace(config.data, train=(train,), validation=(validation,)),
        tokenizer=str(out / "data" / "tokenizer.json"),
        checkpoint=replace(config.checkpoint, directory=str(out / "run")),
    )


def shipped_config(name: str) -> Path:
    """A config of the repository's `configs/`; a wheel carries them inside the package."""
    package = Path(__file__).parent
    inside, beside = package / "_configs", package.parent / "configs"
    return (inside if inside.is_dir() else beside) / f"{name}.yaml"


def _evaluate(params: dict, config: RunConfig) -> tuple[float, float]:
    """Held-out losses of the model and of a bigram model, on the same tokens."""
    assert config.model is not None
    length = config.data.sequence_length
    training = np.asarray(pj.data.open(config.data.train[0]).tokens)
    held_out = np.asarray(pj.data.open(config.data.validation[0]).tokens).astype(np.int32)
    batch = config.training.batch_size
    rows = min(HELD_OUT_ROWS, (len(held_out) - 1) // length) // batch * batch
    if rows == 0:
        raise ValueError(f"{len(held_out):,} held-out tokens do not fill a batch; give more text")
    starts = np.arange(rows)[:, None] * length
    tokens = held_out[starts + np.arange(length + 1)]
    batches = tokens.reshape(-1, batch, length + 1)
    model = float(np.mean([jitted_loss(params, b, config=config) for b in batches]))
    return model, bigram_loss(training, tokens, config.model.vocab_size)


def bigram_loss(training: np.ndarray, rows: np.ndarray, vocab_size: int) -> float:
    """Mean loss in nats of a bigram model with add-k smoothing on each row's next tokens.

    k is the best of a grid on these very rows, which favours the bigram model.
    """
    pairs, counts = np.unique(
        training[:-1].astype(np.int64) * vocab_size + training[1:], return_counts=True
    )
    before = np.bincount(training[:-1], minlength=vocab_size)
    first, second = rows[:, :-1].astype(np.int64).ravel(), rows[:, 1:].ravel()
    wanted = first * vocab_size + second
    at = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[at] == wanted, counts[at], 0)

    def loss(k: float) -> float:
        return float(-np.log((seen + k) / (before[first] + k * vocab_size)).mean())

    return min(map(loss, (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)))


def _continue(model: Model, prompts: Sequence[str]) -> list[str]:
    assert model.tokenizer is not None
    rows = pj.generate(model, prompts, max_new_tokens=24, temperature=0.7)
    return [model.tokenizer.decode(row) for row in rows]
