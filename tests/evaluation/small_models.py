"""For the tests of scoring: small models, random and trained, and tasks of every type."""

import json
from pathlib import Path
from typing import Any

import bpe
import jax
import numpy as np
import optax
import yaml
from reference import random_params

import pythia_jax as pj
from pythia_jax.bridge.model import Model
from pythia_jax.configs import ModelConfig

CONFIG = ModelConfig(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=3,
    vocab_size=352,
    max_position_embeddings=96,
)
LINES = [
    "The old woman carried a basket of apples to the market, and sold every apple she had.",
    "In the morning the river was grey and slow; in the evening it was red and slow.",
    "A boy who could not count to ten was asked how many boats there were. He said: many.",
    "When the train stopped, nobody got out, and nobody got in, and the train went on.",
    "She read the letter twice, folded it, and put it back into the box with the letters.",
    "There were three doors in the wall: one of wood, one of iron, and one of glass.",
]
TEXT = "\n".join(LINES) + "\n"


def tokenizer_files() -> dict[str, bytes]:
    return {"tokenizer.json": bpe.small([TEXT]).to_str().encode()}


def random_model(seed: int = 0, config: ModelConfig = CONFIG) -> Model:
    """Weights so wide that scores differ from token to token."""
    params = jax.tree.map(lambda x: 2 * x, random_params(config, seed))
    return Model(params, config, tokenizer_files(), source="a random model")


def trained_model(steps: int = 80) -> Model:
    """Trained on `TEXT` until it knows some of it by heart."""
    files = tokenizer_files()
    model = Model(random_params(CONFIG, 1), CONFIG, files, source="a trained model", step=steps)
    assert model.tokenizer is not None
    stream = np.array(model.tokenizer.encode(TEXT * 4).ids, np.int32)
    optimizer = optax.adam(3e-3)
    rng = np.random.default_rng(0)

    @jax.jit
    def step(params: Any, state: Any, rows: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(pj.loss)(params, rows, CONFIG)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    params, state = model.params, optimizer.init(model.params)
    for _ in range(steps):
        starts = rng.integers(0, len(stream) - 65, 8)
        rows = np.stack([stream[at : at + 65] for at in starts])
        params, state, value = step(params, state, rows)
    assert float(value) < 3
    return Model(params, CONFIG, files, source=model.source, step=steps)


def write_tasks(folder: Path) -> list[str]:
    """A task of each output type, in a folder of task files; their names."""
    folder.mkdir()
    words = [line.split(" ") for line in LINES]
    # Questions of any length: nothing before the word, some words, more than the model takes.
    last = [{"context": " ".join(w[:-1]), "word": w[-1]} for w in words]
    last += [{"context": "", "word": "The old"}, {"context": TEXT * 2, "word": "The old woman"}]
    last += [{"context": "many of the ", "word": "boats"}]
    choices = [
        {
            "query": f"{line}\nHow many?",
            "choices": ["one", "many", "ten apples", "a"],
            "gold": i % 4,
        }
        for i, line in enumerate(LINES)
    ]
    letters = [{**row, "choices": list("ABCD")} for row in choices]
    texts = [{"text": line} for line in [*LINES, TEXT, TEXT * 3, "a"]]
    prompts = [{"prompt": line[: 8 * i + 5]} for i, line in enumerate([*LINES, TEXT * 2])]
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    few = {"num_fewshot": 2, "fewshot_split": "test"}
    tasks: dict[str, tuple[list[dict], dict[str, Any]]] = {
        "last_words": (last, {
            "output_type": "loglikelihood", "doc_to_text": "{{context}}",
            "doc_to_target": "{{word}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        }),
        "choices": (choices, choice),
        "letters_few_shot": (letters, {**choice, **few}),
        "whole_texts": (texts, {
            "output_type": "loglikelihood_rolling", "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        }),
        "lines": (prompts, {
            "output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "",
            "generation_kwargs": {"until": ["\n", " and"], "max_gen_toks": 40},
            "metric_list": [{"metric": "exact_match"}],
        }),
        "lines_few_shot": (prompts, {
            "output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "",
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 20},
            "metric_list": [{"metric": "exact_match"}], **few,
        }),
    }  # fmt: skip
    for name, (rows, task) in tasks.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        where: dict[str, Any] = {"dataset_path": "json", "test_split": "test"}
        where["dataset_kwargs"] = {
            "data_files": {"test": str(data)}, "cache_dir": str(folder / "cache"),
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **where, **task}))
    return list(tasks)
