"""Training data: text to tokens, tokens to the exact batches of GPT-NeoX v1.0.

    document    the tokens of one text; what an `IndexedDataset` holds
    sample      sequence_length + 1 consecutive tokens of the shuffled documents: inputs and, one
                token later, labels
    row         a sample in its place in a batch, `[seq + 1]`
    step        the number of a batch, `[batch, seq + 1]` int32; steps and rows count from 0

`open(prefix)` looks at the documents of a dataset, `batches(config)[step]` at what a run sees,
`tokenize` makes a dataset. Nothing here imports jax.
"""

from pythia_jax.data.batches import Batches, batches, samples
from pythia_jax.data.indexed import Index, IndexedDataset, open_dataset, token_dtype
from pythia_jax.data.indexed import open_dataset as open
from pythia_jax.data.indexed_writer import IndexedDatasetWriter
from pythia_jax.data.sample_order import SampleOrder, build_sample_order
from pythia_jax.data.samples import Pieces, Samples
from pythia_jax.data.texts import read_texts
from pythia_jax.data.tokenize import TokenizedData, load_tokenizer, tokenize, tokenize_texts

__all__ = [
    "Batches",
    "Index",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "Pieces",
    "SampleOrder",
    "Samples",
    "TokenizedData",
    "batches",
    "build_sample_order",
    "load_tokenizer",
    "open",
    "open_dataset",
    "read_texts",
    "samples",
    "token_dtype",
    "tokenize",
    "tokenize_texts",
]
