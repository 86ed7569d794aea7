"""Makes the goldens of the peers again, from their own programs.

    python tests/interp/peers/remake.py .venv-peers

The argument is an environment with Bergson, TransformerLens and kronfluence in it, which
`make test-all` makes. The model and the tokens are those of `case.py`.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax.numpy as jnp
from flax import traverse_util
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import pythia_jax as pj
from pythia_jax.configs import ModelConfig

HERE = Path(__file__).parent
sys.path.append(str(HERE))

import case  # noqa: E402

PEERS = ("bergson", "transformer_lens", "kronfluence")
CONFIG = ModelConfig(
    hidden_size=case.HIDDEN,
    num_hidden_layers=case.LAYERS,
    num_attention_heads=case.HEADS,
    vocab_size=case.VOCAB,
    max_position_embeddings=case.POSITIONS,
    hidden_act="gelu",
)


def model() -> pj.Model:
    """The small model, with a tokenizer of one token a byte."""
    flat = {tuple(path.split("/")): jnp.asarray(w) for path, w in case.weights().items()}
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    files = {"tokenizer.json": tokenizer.to_str().encode()}
    return pj.Model(traverse_util.unflatten_dict(flat), CONFIG, files)


def remake(peer: str, venv: Path, out: Path) -> Path:
    """Runs one peer on the small model, in its own environment; the file that it wrote."""
    # Not resolved: the link is what makes it that environment's Python.
    python = Path(os.path.abspath(venv)) / "bin" / "python"
    written = out / f"{peer}.npz"
    with tempfile.TemporaryDirectory() as folder:
        pj.save_hf(model(), Path(folder, "model"))
        done = subprocess.run(
            [python, HERE / f"with_{peer}.py", Path(folder, "model"), written.absolute()],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
            cwd=folder,
            check=False,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"{peer}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    return written


if __name__ == "__main__":
    for name in sys.argv[2:] or PEERS:
        print(remake(name, Path(sys.argv[1]), HERE))
