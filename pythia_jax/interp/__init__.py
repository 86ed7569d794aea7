"""Any gradient, of anything, at any step: pure functions of `(params, tokens, config, …)`.

All run under `jax.jit` and on the ambient mesh. Tokens are `[batch, seq + 1]` where a loss is
meant and `[batch, seq]` where only a forward pass or a metric is. Losses are in nats.
"""

import importlib
from typing import TYPE_CHECKING, Any

# At once, where a module has its function's name: imported later, the module would take it.
from pythia_jax.interp.activations import activations

if TYPE_CHECKING:
    from pythia_jax.interp import dynamics, linear_probe, tuned_lens
    from pythia_jax.interp.activations import (
        activation_gradients,
        answer_log_probability,
        logit_difference,
        token_loss,
    )
    from pythia_jax.interp.attribution import (
        attribution_patching,
        edge_mask,
        edge_readers,
        edge_writers,
    )
    from pythia_jax.interp.attribution_table import compare, compare_variants
    from pythia_jax.interp.auditing import (
        Audit,
        audit,
    )
    from pythia_jax.interp.bergson import export_index
    from pythia_jax.interp.build import build_index, build_index_of
    from pythia_jax.interp.counterfactuals import Counterfactual, counterfactual
    from pythia_jax.interp.curvature import (
        fisher_diagonal,
        ggn_vp,
        hessian_density,
        hessian_top_eigenvalues,
        hvp,
    )
    from pythia_jax.interp.dump import dump_activations
    from pythia_jax.interp.dumped import Dump, open_dump
    from pythia_jax.interp.dynamics import (
        GradientCosines,
        OverCheckpoints,
        gradient_cosines,
        over_checkpoints,
        read_curves,
    )
    from pythia_jax.interp.factors import Factors, fit_factors, sample_labels
    from pythia_jax.interp.gradients import (
        LINEAR,
        collect,
        gradient_norms,
        per_example_gradients,
    )
    from pythia_jax.interp.index import Index, open_index
    from pythia_jax.interp.influence import pairwise, scores, token_scores, tracin
    from pythia_jax.interp.lens_reading import read_prompt
    from pythia_jax.interp.lenses import LensLosses, TunedLens, lens_losses, logit_lens
    from pythia_jax.interp.measures import (
        Measure,
        gradient_norm_curve,
        lens_curve,
        noise_scale_curve,
        token_loss_curve,
    )
    from pythia_jax.interp.metagradients import metagradient, trained
    from pythia_jax.interp.noise_scale import NoiseScale, gradient_noise_scale
    from pythia_jax.interp.patching import Node, activation_patching, all_nodes
    from pythia_jax.interp.plots import (
        influence_scatter,
        layer_position_grid,
        patching_grid,
        token_heat_map,
    )
    from pythia_jax.interp.preconditioning import adam_factors, adam_updates, precondition
    from pythia_jax.interp.projection import Projection, matrices
    from pythia_jax.interp.querying import Hits, query, query_of
    from pythia_jax.interp.resuming import Resumed, resumed
    from pythia_jax.interp.token_attribution import input_x_gradient, integrated_gradients
    from pythia_jax.interp.updates import Update, update

# Imported when first asked for: name → the module of this package that has it.
_HOMES = {
    "LensLosses": "lenses",
    "TunedLens": "lenses",
    "lens_losses": "lenses",
    "logit_lens": "lenses",
    "Audit": "auditing",
    "audit": "auditing",
    "GradientCosines": "dynamics",
    "OverCheckpoints": "dynamics",
    "gradient_cosines": "dynamics",
    "over_checkpoints": "dynamics",
    "read_curves": "dynamics",
    "Measure": "measures",
    "gradient_norm_curve": "measures",
    "lens_curve": "measures",
    "noise_scale_curve": "measures",
    "token_loss_curve": "measures",
    "read_prompt": "lens_reading",
    "Resumed": "resuming",
    "resumed": "resuming",
    "metagradient": "metagradients",
    "trained": "metagradients",
    "fisher_diagonal": "curvature",
    "ggn_vp": "curvature",
    "hessian_density": "curvature",
    "hessian_top_eigenvalues": "curvature",
    "hvp": "curvature",
    "activation_gradients": "activations",
    "answer_log_probability": "activations",
    "logit_difference": "activations",
    "token_loss": "activations",
    "attribution_patching": "attribution",
    "edge_mask": "attribution",
    "edge_readers": "attribution",
    "edge_writers": "attribution",
    "compare": "attribution_table",
    "compare_variants": "attribution_table",
    "Node": "patching",
    "activation_patching": "patching",
    "all_nodes": "patching",
    "influence_scatter": "plots",
    "layer_position_grid": "plots",
    "patching_grid": "plots",
    "token_heat_map": "plots",
    "export_index": "bergson",
    "Counterfactual": "counterfactuals",
    "counterfactual": "counterfactuals",
    "Dump": "dumped",
    "dump_activations": "dump",
    "open_dump": "dumped",
    "Update": "updates",
    "update": "updates",
    "build_index": "build",
    "build_index_of": "build",
    "Index": "index",
    "open_index": "index",
    "Projection": "projection",
    "matrices": "projection",
    "Hits": "querying",
    "query": "querying",
    "query_of": "querying",
    "input_x_gradient": "token_attribution",
    "integrated_gradients": "token_attribution",
    "LINEAR": "gradients",
    "collect": "gradients",
    "gradient_norms": "gradients",
    "per_example_gradients": "gradients",
    "NoiseScale": "noise_scale",
    "gradient_noise_scale": "noise_scale",
    "Factors": "factors",
    "fit_factors": "factors",
    "sample_labels": "factors",
    "precondition": "preconditioning",
    "adam_factors": "preconditioning",
    "adam_updates": "preconditioning",
    "pairwise": "influence",
    "scores": "influence",
    "token_scores": "influence",
    "tracin": "influence",
}

# Names that are modules: functions are called tuned_lens.fit, dynamics.over_checkpoints.
_MODULES = ("dynamics", "linear_probe", "tuned_lens")

__all__ = [
    "LINEAR",
    "Audit",
    "Counterfactual",
    "Dump",
    "Factors",
    "GradientCosines",
    "Hits",
    "Index",
    "LensLosses",
    "Measure",
    "Node",
    "NoiseScale",
    "OverCheckpoints",
    "Projection",
    "Resumed",
    "TunedLens",
    "Update",
    "activation_gradients",
    "activation_patching",
    "activations",
    "adam_factors",
    "adam_updates",
    "all_nodes",
    "answer_log_probability",
    "attribution_patching",
    "audit",
    "build_index",
    "build_index_of",
    "collect",
    "compare",
    "compare_variants",
    "counterfactual",
    "dump_activations",
    "dynamics",
    "edge_mask",
    "edge_readers",
    "edge_writers",
    "export_index",
    "fisher_diagonal",
    "fit_factors",
    "ggn_vp",
    "gradient_cosines",
    "gradient_noise_scale",
    "gradient_norm_curve",
    "gradient_norms",
    "hessian_density",
    "hessian_top_eigenvalues",
    "hvp",
    "influence_scatter",
    "input_x_gradient",
    "integrated_gradients",
    "layer_position_grid",
    "lens_curve",
    "lens_losses",
    "linear_probe",
    "logit_difference",
    "logit_lens",
    "matrices",
    "metagradient",
    "noise_scale_curve",
    "open_dump",
    "open_index",
    "over_checkpoints",
    "pairwise",
    "patching_grid",
    "per_example_gradients",
    "precondition",
    "query",
    "query_of",
    "read_curves",
    "read_prompt",
    "resumed",
    "sample_labels",
    "scores",
    "token_heat_map",
    "token_loss",
    "token_loss_curve",
    "token_scores",
    "tracin",
    "trained",
    "tuned_lens",
    "update",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"pythia_jax.interp.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'pythia_jax.interp' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pythia_jax.interp.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
