"""How many floating-point operations a training step is worth, by one convention for every table.

The convention: a product of matrices (m, k) x (k, n) is 2mnk operations, and nothing else counts.
A training step is three forward passes (one forward, two in the backward pass, for the inputs and
for the weights). Causal attention is counted at half of all pairs, since the masked half need not
be computed. The unembedding counts, rows that pad the vocabulary included; looking embeddings up
does not. What rematerialisation computes again does not count, so the same model has the same
FLOPs whatever its settings, and utilisation by it (MFU; Chowdhery et al., 2022, appendix B) can be
compared. Before this, Narayanan et al. (2021, appendix) counted all pairs and one recomputation.
"""

from pythia_jax.configs import ModelConfig


def forward_flops(config: ModelConfig, batch: int, seq: int) -> dict[str, float]:
    """FLOPs of one forward pass over `[batch, seq]` tokens, by part.

    dense: the four products with the weights of a layer, all layers. attention: scores and
    mixing of values, causal half. unembedding: logits at every position.
    """
    tokens, hidden = batch * seq, config.hidden_size
    weights = hidden * (3 * hidden + hidden + 2 * config.intermediate_size)
    pairs = tokens * seq / 2
    return {
        "dense": 2.0 * config.num_hidden_layers * tokens * weights,
        "attention": 2.0 * config.num_hidden_layers * pairs * (2 * hidden),
        "unembedding": 2.0 * tokens * hidden * config.vocab_size,
    }


def model_flops(config: ModelConfig, batch: int, seq: int) -> float:
    """FLOPs of one training step on `[batch, seq]` tokens: three times the forward pass."""
    return 3 * sum(forward_flops(config, batch, seq).values())
