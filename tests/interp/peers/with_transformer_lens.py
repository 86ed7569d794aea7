"""TransformerLens's gradients and attribution of the small model: run by `remake.py`.

    python with_transformer_lens.py MODEL OUT.npz

Gradients are those of its backward hooks.
"""

# pyright: reportMissingImports=false
# These are in the peers' environment, not in ours.

import sys
from collections.abc import Callable, Iterable
from typing import Any

import case
import numpy as np
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.attribution_patching import (
    EdgeAttributionConfig,
    Node,
    attribution_patch,
    cache_activation_and_gradient,
)

HOOKS = {
    "resid_pre": "hook_resid_pre",
    "attn.q": "attn.hook_q",
    "attn.k": "attn.hook_k",
    "attn.v": "attn.hook_v",
    "attn.z": "attn.hook_z",
    "mlp.pre": "mlp.hook_pre",
    "mlp.post": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
"""Theirs, of a layer, by our names of sites."""
LAYERS, HEADS = range(case.LAYERS), range(case.HEADS)


def metric(logits: torch.Tensor) -> torch.Tensor:
    return (logits[..., -1, case.ANSWER] - logits[..., -1, case.WRONG]).sum()


def gradients(model: TransformerBridge, tokens: torch.Tensor) -> dict[str, Any]:
    """`[layer, batch, seq, …]` by site."""
    names = {site: [f"blocks.{i}.{hook}" for i in LAYERS] for site, hook in HOOKS.items()}
    kept = [name for layers in names.values() for name in layers]
    cache = cache_activation_and_gradient(model, tokens, metric, names_filter=kept)
    found: dict[str, Any] = {"metric": cache.metric.numpy()}
    for site, layers in names.items():
        arrays = [cache.gradients[name] for name in layers]
        assert all(array is not None for array in arrays), site
        found[f"gradient {site}"] = np.stack([array.numpy() for array in arrays])
    return found


def writers(position: int) -> list[Node]:
    found = [Node(kind="embed", position=position)]
    for layer in LAYERS:
        found += [
            Node(kind="attn_head_out", layer=layer, head=head, position=position) for head in HEADS
        ]
        found.append(Node(kind="mlp_out", layer=layer, position=position))
    return found


def readers(position: int) -> list[Node]:
    found = []
    for layer in LAYERS:
        for kind in ("q_input", "k_input", "v_input"):
            found += [Node(kind=kind, layer=layer, head=h, position=position) for h in HEADS]
        found.append(Node(kind="mlp_in", layer=layer, position=position))
    return [*found, Node(kind="logits", layer=case.LAYERS - 1, position=position)]


def over_positions(
    make: Callable[[int], Iterable[float]], shape: tuple[int, ...], seq: int
) -> np.ndarray:
    return np.array([list(make(position)) for position in range(seq)]).reshape(seq, *shape)


def main(folder: str, out: str) -> None:
    model = TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32)
    model.eval()
    clean, corrupt = (torch.tensor(batch).long() for batch in case.clean_and_corrupt())
    found = gradients(model, corrupt)
    with torch.no_grad():
        found["metrics clean"], found["metrics corrupt"] = (
            np.array([float(metric(model(row[None]))) for row in batch])
            for batch in (clean, corrupt)
        )
    nodes, edges = [], []
    seq = clean.shape[1]
    for pair in zip(clean, corrupt, strict=True):
        one = [row[None] for row in pair]
        scores = attribution_patch(model, *one, metric, EdgeAttributionConfig("node")).node_scores
        each = over_positions(
            lambda p, s=scores: (s[writer] for writer in writers(p)), (len(writers(0)),), seq
        )
        nodes.append(each)
        scores = attribution_patch(model, *one, metric, EdgeAttributionConfig("edge")).edge_scores
        each = over_positions(
            lambda p, s=scores: (s.get((w, r), 0.0) for w in writers(p) for r in readers(p)),
            (len(writers(0)), len(readers(0))),
            seq,
        )
        edges.append(each.sum(axis=0))
    found["nodes"] = np.stack(nodes, axis=-1)  # [seq, writers, batch]
    found["edges"] = np.stack(edges, axis=-1)  # [writers, readers, batch]
    np.savez_compressed(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
