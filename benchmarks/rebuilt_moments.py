"""How near Adam's rebuilt moments come to the true ones, and what that does to the loss.

A small model learns Python's own library to some step, as the quickstart does. From there it goes
on with its true state, with none (`zero`), and with moments rebuilt from the last K batches at the
weights of that step (`rebuild:K`), all on the same batches. Also tried: the truncated sums left as
they are, with Adam's counter at K.

Cosines are those of each layer's tensors with the true moments; the ratio of norms is the median
over tensors. Differences of loss are to the uninterrupted run, batch by batch, in nats.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pythia_jax import configs, data, quickstart
from pythia_jax.configs import RunConfig
from pythia_jax.data.tokenize import tokenize_texts
from pythia_jax.model import parameters
from pythia_jax.model.parameters import count
from pythia_jax.sharding import make_mesh
from pythia_jax.training.feed import GlobalBatches
from pythia_jax.training.rebuild import matured, shown, zero_state
from pythia_jax.training.step import TrainState, jitted_train_step
from pythia_jax.training.trainer import fresh_state

HEADER = (
    "moments",
    "cosine of m: min",
    "median",
    "cosine of v: min",
    "median",
    "norm of m",
    "norm of v",
    "mean abs. Δ loss",
    "Δ loss at the end",
)
END = 10
"""Losses that "at the end" is the mean of."""


def make_config(folder: Path, width: int, steps: int, characters: int) -> RunConfig:
    texts, total = [], 0
    for text in quickstart.standard_library():
        texts.append(text)
        total += len(text)
        if total > characters:
            break
    tokenizer = quickstart.train_tokenizer(texts, 2048)
    tokenize_texts(texts, folder / "train", tokenizer, append_eod=True)
    return configs.from_dict(
        {
            "model": {
                "hidden_size": width,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "vocab_size": 2048,
                "max_position_embeddings": 128,
            },
            "data": {"train": [str(folder / "train")], "sequence_length": 128},
            "optimizer": {
                "peak_learning_rate": 4e-3,
                "min_learning_rate": 4e-4,
                "warmup_fraction": 0.05,
            },
            "training": {
                "steps": steps,
                "batch_size": 8,
                "precision": "float32",
                "remat": "none",
            },
        }
    )


def copied(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def go_on(
    state: TrainState, batches: GlobalBatches, start: int, stop: int, config: RunConfig
) -> tuple[TrainState, np.ndarray]:
    """The state after batches `start` to `stop`, and the losses on them. `state` is given up."""
    losses = []
    for step in range(start, stop):
        state, metrics = jitted_train_step(state, batches[step], config=config)
        losses.append(metrics["loss"])
        if (step + 1) % 50 == 0:
            click.echo(f"step {step + 1}, loss {float(losses[-1]):.3f}", err=True)
    return state, np.array([float(loss) for loss in losses])


def starts(
    true: TrainState,
    windows: list[int],
    batches: GlobalBatches,
    config: RunConfig,
    mesh: Mesh,
) -> Iterator[tuple[str, TrainState]]:
    """States of the same weights to go on from, by name."""
    step = int(true.step)
    zero = partial(zero_state, step=step, config=config, mesh=mesh)
    yield "zero", zero(copied(true.params))
    for last in windows:
        first = step - last
        past = (batches[i] for i in range(first, step))
        state = shown(zero(copied(true.params)), past, first, config, mesh)
        yield f"rebuild:{last}", matured(copied(state), step, last, config)
        yield f"sums of {last} as they are", state


def compared(state: TrainState, true: TrainState) -> list[str]:
    """Cosines (smallest and median over tensors) and median ratios of norms, of m and v."""
    cosines, norms = [], []
    for name in ("mu", "nu"):
        both = (getattr(s.opt_state[1], name) for s in (state, true))
        ours, theirs = (list(tensors(tree)) for tree in both)
        sizes = [np.array([np.linalg.norm(x) for x in one]) for one in (ours, theirs)]
        dots = np.array([x @ y for x, y in zip(ours, theirs, strict=True)])
        cosine, ratio = dots / (sizes[0] * sizes[1]), sizes[0] / sizes[1]
        cosines += [f"{cosine.min():.3f}", f"{np.median(cosine):.3f}"]
        norms.append(f"{np.median(ratio):.2f}")
    return cosines + norms


def tensors(tree: Any) -> Iterator[np.ndarray]:
    """Every tensor flat and in float64, one for each layer."""
    for parameter, array in parameters.items(tree):
        for part in array if parameter.stacked else [array]:
            yield np.asarray(part, np.float64).ravel()


@click.command(help=__doc__)
@click.option("--step", default=400, show_default=True, help="where training is cut")
@click.option("--after", default=100, show_default=True, help="steps trained from there")
@click.option("--steps", default=1000, show_default=True, help="that the schedule is laid out over")
@click.option("--windows", default="20,60,100", show_default=True, help="values of K")
@click.option("--width", default=160, show_default=True, help="hidden size; there are 4 layers")
@click.option("--characters", default=4_000_000, show_default=True, help="of text to learn from")
def main(step: int, after: int, steps: int, windows: str, width: int, characters: int) -> None:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(Path(folder), width, steps, characters)
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        batches = GlobalBatches(data.batches(config), mesh)
        with jax.set_mesh(mesh):
            true, _ = go_on(fresh_state(config, mesh), batches, 0, step, config)
            _, straight = go_on(copied(true), batches, step, step + after, config)
            rows = []
            for name, state in starts(true, [*map(int, windows.split(","))], batches, config, mesh):
                click.echo(name, err=True)
                cells = ["-"] * 6 if name == "zero" else compared(state, true)
                gap = go_on(state, batches, step, step + after, config)[1] - straight
                rows.append([name, *cells, f"{abs(gap).mean():.4f}", f"{gap[-END:].mean():+.4f}"])
    assert config.model is not None
    size, seconds = count(config.model, embedding=False), time.perf_counter() - began
    click.echo(
        f"{size / 1e6:.2f} M parameters without embeddings, cut at step {step} of {steps}; loss "
        f"{straight[:END].mean():.3f} there, {straight[-END:].mean():.3f} after {after} steps "
        f"(jax {jax.__version__}, {jax.default_backend()}, {seconds:.0f} s)\n"
    )
    for row in (HEADER, ["---"] * len(HEADER), *rows):
        click.echo(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    sys.exit(main())
