"""kronfluence's influence scores on the small model: run by `remake.py`.

    python with_kronfluence.py MODEL OUT.npz

Losses are summed over the tokens of a row; the Fisher matrix is the empirical one, of the true
labels, so that nothing is drawn. Only the layers' linear modules are looked at.
"""

# pyright: reportMissingImports=false
# These are in the peers' environment, not in ours.

import sys
import tempfile
from pathlib import Path
from typing import Any

import case
import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch.nn import functional
from torch.utils.data import TensorDataset
from transformers import AutoModelForCausalLM

TRAIN, QUERIES = 12, 3
MODULES = [
    f"gpt_neox.layers.{layer}.{name}"
    for layer in range(case.LAYERS)
    for name in (
        "attention.query_key_value",
        "attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    )
]
SHOWN = "gpt_neox.layers.0.attention.dense"
"""Of this module the matrices themselves are kept."""
SCORES = {
    "identity": ("identity", None),
    "kfac": ("kfac", None),
    "ekfac": ("ekfac", None),
    "ekfac 1e-8": ("ekfac", 1e-8),
}
"""Strategy and damping; None is a tenth of the mean eigenvalue, 1e-8 is the default."""


class NextToken(Task):
    def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
        assert not sample
        (tokens,) = batch
        logits = model(tokens[:, :-1], use_cache=False).logits
        return functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
        )

    def compute_measurement(self, batch: Any, model: Any) -> torch.Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return MODULES

    def get_attention_mask(self, batch: Any) -> None:
        return None


def ours(name: str) -> str:
    return name.removeprefix("gpt_neox.")


def main(folder: str, out: str) -> None:
    task = NextToken()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    model = prepare_model(model, task)
    train, queries = (
        TensorDataset(torch.tensor(case.tokens(name, rows)).long())
        for name, rows in (("train", TRAIN), ("queries", QUERIES))
    )
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        analyzer = Analyzer(
            "peers", model, task, cpu=True, disable_tqdm=True, output_dir=str(Path(place))
        )
        for strategy in ("identity", "kfac", "ekfac"):
            analyzer.fit_all_factors(
                strategy,
                train,
                per_device_batch_size=4,
                factor_args=FactorArguments(strategy=strategy, use_empirical_fisher=True),
            )
        for name, (strategy, damping) in SCORES.items():
            analyzer.compute_pairwise_scores(
                name.replace(" ", "_"),
                strategy,
                queries,
                train,
                per_device_query_batch_size=QUERIES,
                per_device_train_batch_size=4,
                score_args=ScoreArguments(damping_factor=damping, compute_per_module_scores=True),
            )
            scores = analyzer.load_pairwise_scores(name.replace(" ", "_"))
            assert scores is not None and set(scores) == set(MODULES), list(scores or ())
            found[f"scores {name}"] = np.stack([scores[module].numpy() for module in MODULES])
        covariances = analyzer.load_covariance_matrices("ekfac")
        eigen = analyzer.load_eigendecomposition("ekfac")
        squares = analyzer.load_lambda_matrices("ekfac")
        assert covariances is not None and eigen is not None and squares is not None
        for side in ("activation", "gradient"):
            count = covariances[f"num_{side}_covariance_processed"][SHOWN]
            matrix = covariances[f"{side}_covariance"][SHOWN] / count
            found[f"{side} covariance {ours(SHOWN)}"] = matrix.numpy()
            for module in MODULES:
                values = eigen[f"{side}_eigenvalues"][module]
                found[f"{side} eigenvalues {ours(module)}"] = values.numpy()
        for module in MODULES:
            mean = squares["lambda_matrix"][module] / squares["num_lambda_processed"][module]
            found[f"lambda mean {ours(module)}"] = mean.double().mean().numpy()
            if module == SHOWN:
                found[f"lambda {ours(module)}"] = mean.numpy()
    np.savez_compressed(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
