"""Files of results as the tests write them."""

import json
from pathlib import Path
from typing import Any

PUBLISHED = Path(__file__).parent / "published"
"""Files published with Pythia (github.com/EleutherAI/pythia, evals), by their names and places
there: their numbers of a few tasks and, of the settings of GPT-NeoX, those that are read."""
GIVEN = Path(__file__).parents[3] / "shared" / "data" / "published_evals"
"""Whole files, where they lie beside this repository."""


def old_file(
    path: Path,
    scores: dict[str, Any],
    *,
    model: str = "hf-causal",
    model_args: Any = "",
    num_fewshot: int = 0,
) -> Path:
    """A file of the harness of 2022. scores: task → metric → number."""
    config = {
        "model": model,
        "model_args": model_args,
        "num_fewshot": num_fewshot,
        "batch_size": 16,
        "device": "cuda:0",
        "no_cache": True,
        "limit": None,
        "bootstrap_iters": 100000,
        "description_dict": {},
    }
    content = {"results": scores, "versions": dict.fromkeys(scores, 0), "config": config}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))
    return path


def lambada(folder, size, step, acc, *, shots=0, stderr=0.005):
    """A file as published, of a size (`70m-deduped`), with one accuracy."""
    name = {0: f"zero-shot/{size}", 5: f"five-shot/{size}-5shot"}[shots]
    path = folder / f"pythia-{size}" / f"{name}_step{step}.json"
    return old_file(path, {"lambada_openai": {"acc": acc, "acc_stderr": stderr}}, num_fewshot=shots)


def returned(scores, **config):
    """What the present harness returns. scores: task → metric → number, without filters."""
    results = {
        task: {"alias": task, "sample_len": 10, **{f"{k},none": v for k, v in metrics.items()}}
        for task, metrics in scores.items()
    }
    return {
        "results": results,
        "configs": {task: {"task": task} for task in scores},
        "versions": dict.fromkeys(scores, 1.0),
        "n-shot": dict.fromkeys(scores, 0),
        "n-samples": {task: {"original": 10, "effective": 10} for task in scores},
        "config": {"model": "PythiaJax", "model_args": None, "limit": None, **config},
        "lm_eval_version": "0.4.13",
    }
