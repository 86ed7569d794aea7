"""How well scores of influence foretell what training without a row would have done.

A small model learns sequences of several topics. From a checkpoint on the way, training goes on for
some steps; then it does so again, over and over, each time with one row of one batch left out (its
weight set to 0), and the losses on queries are compared with those of the run that had all rows.
Every scorer says beforehand what each row would do, for all rows at once; the table correlates the
two, over the rows left out, with 95 % intervals by the bootstrap over those rows.

Noise is measured too: rows in another order are the same training, but for rounding.
"""

import functools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from scipy import stats
from tqdm import tqdm

from pythia_jax import configs
from pythia_jax.configs import RunConfig
from pythia_jax.interp.factors import fit_factors
from pythia_jax.interp.influence import scores
from pythia_jax.interp.metagradients import metagradient, trained
from pythia_jax.interp.preconditioning import precondition
from pythia_jax.model.loss import loss
from pythia_jax.model.parameters import Params, count
from pythia_jax.training.optimizer import learning_rates
from pythia_jax.training.step import TrainState, init_state, jitted_train_step, train_step

VOCABULARY, TOPICS, QUERY_ROWS = 64, 6, 8
BOOTSTRAPS = 2000

Scorer = Callable[[TrainState, np.ndarray, np.ndarray, RunConfig], np.ndarray]
"""(state, batches `[step, batch, seq + 1]`, queries `[query, row, seq + 1]`, config) to what the
weight of each row adds to each query's loss, `[query, step, batch]`."""


@dataclass(frozen=True)
class Task:
    """What is trained on, from where, and what is asked."""

    config: RunConfig
    state: TrainState
    batches: np.ndarray
    queries: np.ndarray


def make_config(width: int, layers: int, batch: int, seq: int, rate: float) -> RunConfig:
    return configs.from_dict(
        {
            "model": {
                "hidden_size": width,
                "num_hidden_layers": layers,
                "num_attention_heads": 4,
                "vocab_size": VOCABULARY,
                "max_position_embeddings": seq,
            },
            "data": {"sequence_length": seq},
            "optimizer": {"peak_learning_rate": rate, "min_learning_rate": rate / 10},
            "training": {
                "steps": 1000,
                "batch_size": batch,
                "precision": "float32",
                "remat": "none",
            },
        }
    )


def rows_of(topics: np.ndarray, seq: int, rng: np.random.Generator) -> np.ndarray:
    """`[row, seq + 1]`: each row a walk over its topic's own chain of tokens.

    From each token a chain goes on to one of three, of probabilities .5, .3 and .2, which depend
    on the topic; the topics share their tokens, so that a row has to be read to be foretold.
    """
    chains = np.random.default_rng(0).integers(0, VOCABULARY, (TOPICS, VOCABULARY, 3))
    rows = np.empty((len(topics), seq + 1), np.int32)
    rows[:, 0] = rng.integers(0, VOCABULARY, len(topics))
    for t in range(seq):
        branch = rng.choice(3, len(topics), p=(0.5, 0.3, 0.2))
        rows[:, t + 1] = chains[topics, rows[:, t], branch]
    return rows


def make_task(config: RunConfig, start: int, steps: int, queries: int) -> Task:
    """A model trained for `start` steps, the batches of the next `steps`, held-out queries."""
    rng = np.random.default_rng(1)
    batch, seq = config.training.batch_size, config.data.sequence_length

    def next_batch() -> np.ndarray:
        return rows_of(rng.integers(0, TOPICS, batch), seq, rng)

    state = jax.jit(init_state, static_argnums=0)(config)
    for step in range(start):
        state, metrics = jitted_train_step(state, next_batch(), config=config)
        if (step + 1) % 50 == 0:
            click.echo(f"step {step + 1}, loss {float(metrics['loss']):.3f}", err=True)
    batches = np.stack([next_batch() for _ in range(steps)])
    asked = [rows_of(rng.integers(0, TOPICS, QUERY_ROWS), seq, rng) for _ in range(queries)]
    return Task(config, state, batches, np.stack(asked))


def query_losses(params: Params, queries: jax.Array | np.ndarray, config: RunConfig) -> jax.Array:
    """Mean losses of the queries, `[query]`."""
    assert config.model is not None
    model = config.model
    return jax.lax.map(lambda rows: loss(params, rows, model), jnp.asarray(queries))


def by_metagradient(
    state: TrainState, batches: np.ndarray, queries: np.ndarray, config: RunConfig
) -> np.ndarray:
    def query_loss(params: Params) -> jax.Array:
        return query_losses(params, queries, config)

    return np.asarray(metagradient(state, batches, query_loss, steps=len(batches), config=config))


def by_tracin(
    state: TrainState, batches: np.ndarray, queries: np.ndarray, config: RunConfig
) -> np.ndarray:
    """TracIn (Pruthi et al., 2020) with every step's own weights and rate: −η <∇ row, ∇ query>."""
    assert config.model is not None
    model = config.model
    rates = learning_rates(config.optimizer, config.training.steps)

    @jax.jit
    def step(params: Params, tokens: jax.Array) -> jax.Array:
        ones = jnp.ones(tokens.shape[0])
        by_weights = jax.grad(lambda w, p: loss(p, tokens, model, w))
        gradients = jax.jacrev(lambda p: query_losses(p, queries, config))(params)
        # The derivative of the rows' losses along a query's gradient.
        along = functools.partial(jax.jvp, lambda p: by_weights(ones, p), (params,))
        return jax.lax.map(lambda gradient: along((gradient,))[1], gradients)

    made = []
    for tokens in batches:
        made.append(-rates[int(state.updates)] * step(state.params, tokens))
        state, _ = jax.jit(train_step, static_argnames="config")(state, tokens, config=config)
    return np.stack(made, axis=1)


def by_ekfac(
    state: TrainState, batches: np.ndarray, queries: np.ndarray, config: RunConfig
) -> np.ndarray:
    """EK-FAC (Grosse et al., 2023) on the layers' linear modules, at the weights of the end.

    Factors from the rows trained on, with labels drawn from the model; a tenth of the mean
    eigenvalue as damping.
    """
    assert config.model is not None
    model = config.model
    params = trained(state, batches, np.ones(batches.shape[:2]), config).params
    factors = fit_factors(params, list(batches), model, key=jax.random.key(5))
    gradients = jax.jit(jax.jacrev(lambda p: query_losses(p, queries, config)))(params)
    flat = traverse_util.flatten_dict(gradients, sep="/")
    known = {path: flat[path] for path in factors.parameters}
    directions = precondition(factors, traverse_util.unflatten_dict(known, sep="/"))
    return np.stack([-scores(params, tokens, model, directions) for tokens in batches], axis=1)


SCORERS: dict[str, Scorer] = {
    "metagradient": by_metagradient,
    "TracIn": by_tracin,
    "EK-FAC": by_ekfac,
}


def reruns(task: Task, left_out: list[tuple[int, int]]) -> Iterator[np.ndarray]:
    """For each (step, row): by how much leaving it out changes the queries' losses, `[query]`.

    Training runs again from the step in question; before it nothing is different.
    """
    config, steps = task.config, len(task.batches)
    batches, queries = jnp.asarray(task.batches), jnp.asarray(task.queries)

    @jax.jit
    def finish(state: TrainState, weights: jax.Array, first: int) -> jax.Array:
        def step(i: int, state: TrainState) -> TrainState:
            own = jnp.where(i == first, weights, 1.0)
            return train_step(state, batches[i], own, config=config)[0]

        params = jax.lax.fori_loop(first, steps, step, state).params
        return query_losses(params, queries, config)

    ones = jnp.ones(batches.shape[1])
    with_all = np.asarray(finish(task.state, ones, 0))
    state, at = task.state, 0
    for step, row in left_out:
        while at < step:
            state, _ = jax.jit(train_step, static_argnames="config")(
                state, batches[at], config=config
            )
            at += 1
        yield np.asarray(finish(state, ones.at[row].set(0), step)) - with_all


def noise(task: Task, times: int = 4) -> np.ndarray:
    """Standard deviation of the queries' losses when only the order within batches changes."""
    config, rng = task.config, np.random.default_rng(2)
    losses = []
    for _ in range(times):
        state = task.state
        for tokens in task.batches:
            state, _ = jax.jit(train_step, static_argnames="config")(
                state, rng.permutation(tokens), config=config
            )
        losses.append(np.asarray(query_losses(state.params, task.queries, config)))
    return np.std(losses, axis=0, ddof=1)


def chosen(steps: int, batch: int, examples: int) -> list[tuple[int, int]]:
    """(step, row) of the examples left out, in order, as many at every step as can be."""
    rng = np.random.default_rng(3)
    order = np.argsort(rng.random((steps, batch)), axis=1).T.ravel()
    pairs = zip(np.tile(np.arange(steps), batch), order, strict=True)
    return sorted((int(s), int(r)) for s, r in list(pairs)[:examples])


def correlation(
    kind: Callable[[np.ndarray, np.ndarray], float], foretold: np.ndarray, truth: np.ndarray
) -> tuple[float, float, float]:
    """Mean over queries of the correlation, `[query, example]` each; and its 95 % interval."""

    def mean(pick: np.ndarray) -> float:
        pairs = zip(foretold[:, pick], truth[:, pick], strict=True)
        return float(np.mean([kind(a, b) for a, b in pairs]))

    rng, n = np.random.default_rng(4), truth.shape[1]
    drawn = [mean(rng.integers(0, n, n)) for _ in range(BOOTSTRAPS)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return mean(np.arange(n)), float(low), float(high)


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    return float(stats.pearsonr(a, b).statistic)  # type: ignore


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(stats.spearmanr(a, b).statistic)  # type: ignore


def compare(
    task: Task, examples: int, scorers: dict[str, Scorer]
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, float]]:
    """True changes `[query, example]`, those foretold by each scorer, and its seconds."""
    steps, batch = task.batches.shape[:2]
    pairs = chosen(steps, batch, examples)
    foretold, seconds = {}, {}
    for name, scorer in scorers.items():
        began = time.perf_counter()
        found = scorer(task.state, task.batches, task.queries, task.config)
        seconds[name] = time.perf_counter() - began
        foretold[name] = -np.stack([found[:, step, row] for step, row in pairs], axis=1)
        click.echo(f"{name}: {seconds[name]:.0f} s", err=True)
    began = time.perf_counter()
    runs = tqdm(reruns(task, pairs), total=len(pairs), desc="left out", disable=None)
    truth = np.stack(list(runs), axis=1)
    seconds["reruns"] = time.perf_counter() - began
    return truth, foretold, seconds


def table(truth: np.ndarray, foretold: dict[str, np.ndarray]) -> Iterator[list[str]]:
    queries = [f"query {i}" for i in range(len(truth))]
    yield ["scores", "of", "Pearson", "95 %", "Spearman", "95 %"]
    yield ["---", "---", "--:", "---", "--:", "---"]
    for name, changes in foretold.items():
        for i, of in [*enumerate(queries), (slice(None), "mean of queries")]:
            which = slice(i, i + 1) if isinstance(i, int) else i
            cells = []
            for kind in (pearson, spearman):
                value, low, high = correlation(kind, changes[which], truth[which])
                cells += [f"{value:.4f}", f"{low:.4f} to {high:.4f}"]
            yield [name, of, *cells]


@click.command(help=__doc__)
@click.option("--examples", default=120, show_default=True, help="rows left out, one at a time")
@click.option("--steps", default=20, show_default=True, help="of training with and without them")
@click.option("--start", default=400, show_default=True, help="steps trained before")
@click.option("--queries", default=3, show_default=True, help=f"of {QUERY_ROWS} rows each")
@click.option("--width", default=224, show_default=True, help="hidden size")
@click.option("--layers", default=2, show_default=True)
@click.option("--batch", default=16, show_default=True)
@click.option("--seq", default=128, show_default=True)
@click.option("--rate", default=1e-4, show_default=True, help="the schedule's peak")
@click.option("--out", type=click.Path(path_type=Path), help="an .npz for all scores")
def main(
    examples: int,
    steps: int,
    start: int,
    queries: int,
    width: int,
    layers: int,
    batch: int,
    seq: int,
    rate: float,
    out: Path | None,
) -> None:
    config = make_config(width, layers, batch, seq, rate)
    assert config.model is not None
    task = make_task(config, start, steps, queries)
    truth, foretold, seconds = compare(task, examples, SCORERS)
    spread, rounding = truth.std(axis=1), noise(task)
    click.echo(
        f"{count(config.model) / 1e6:.2f} M parameters, batch {batch} x {seq}, steps {start} to "
        f"{start + steps} at a peak rate of {rate:g}; {examples} rows left out one at a time; "
        f"float32, jax {jax.__version__}, {jax.default_backend()}\n"
        f"standard deviation of the changes {', '.join(f'{s:.1e}' for s in spread)} nats; of "
        f"rounding alone {', '.join(f'{s:.1e}' for s in rounding)}\n"
        f"seconds, compiling included: {', '.join(f'{k} {v:.0f}' for k, v in seconds.items())}\n"
    )
    for row in table(truth, foretold):
        click.echo(f"| {' | '.join(row)} |")
    if out is not None:
        np.savez(out, truth=truth, **foretold)  # type: ignore


if __name__ == "__main__":
    sys.exit(main())
