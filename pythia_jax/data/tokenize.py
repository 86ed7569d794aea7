"""From text to a `.bin/.idx` dataset, on all cores, one document at a time.

As GPT-NeoX's tools/preprocess_data.py: one document of the dataset for every document of text,
those that give no tokens dropped, an end-of-document token only when asked for (Pythia's own data
has none). Special tokens written out in a text (`<|endoftext|>`) become those tokens.
"""

import os
import re
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pythia_jax.data.indexed import token_dtype
from pythia_jax.data.indexed_writer import IndexedDatasetWriter
from pythia_jax.data.texts import PathLike, read_texts

EOD_TOKEN = "<|endoftext|>"
THREADS_AT_MOST = 16
"""More workers are processes: to take ids out of the tokenizers library holds Python's lock for
about a twentieth of the time that encoding takes, so that twenty threads would wait for it."""
_CHUNK_CHARACTERS = 1 << 19  # encoded together: bounds memory, and feeds all to the end
_CHUNKS_AHEAD = 2  # for each worker
_SERIAL = "TOKENIZERS_PARALLELISM"
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>.+))?")

Progress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class TokenizedData:
    """What `tokenize` wrote."""

    prefix: Path
    documents: int
    tokens: int
    dtype: np.dtype


def tokenize(
    inputs: PathLike | Iterable[PathLike],
    out_prefix: PathLike,
    tokenizer: PathLike | Tokenizer,
    *,
    append_eod: bool = False,
    eod_id: int | None = None,
    text_key: str = "text",
    pattern: str = "*",
    workers: int | None = None,
    progress: Progress | None = None,
) -> TokenizedData:
    """Tokenizes files into the dataset `out_prefix.bin` and `out_prefix.idx`.

    Reading, encoding and writing overlap; memory is bounded. Tokens are uint16 if the vocabulary
    has fewer than 65500 entries, else int32. If anything fails, nothing is written.

    Args:
        inputs: files and folders, read as `read_texts` says.
        out_prefix: path of the dataset without suffix; missing folders are made.
        tokenizer: see `load_tokenizer`.
        append_eod: end every document with the end-of-document token.
        eod_id: that token; `<|endoftext|>` of the tokenizer by default.
        text_key: where a JSON line keeps its text.
        pattern: which files of a folder to read (`*.py`).
        workers: how many cores encode; all of them by default. Up to `THREADS_AT_MOST` are
            threads. More are processes, each of which runs the caller's script anew, as Python's
            multiprocessing does: a script must call this under `if __name__ == "__main__":`.
        progress: called after every chunk with the documents, tokens and bytes of text so far.

    Raises:
        FileNotFoundError: an input or the tokenizer is missing.
        ValueError: an input cannot be read, holds no text, or there is no end-of-document token.
        RuntimeError: a worker process was killed.
    """
    texts = read_texts(inputs, text_key=text_key, pattern=pattern)
    return tokenize_texts(
        texts,
        out_prefix,
        tokenizer,
        append_eod=append_eod,
        eod_id=eod_id,
        workers=workers,
        progress=progress,
    )


def tokenize_texts(
    texts: Iterable[str],
    out_prefix: PathLike,
    tokenizer: PathLike | Tokenizer,
    *,
    append_eod: bool = False,
    eod_id: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> TokenizedData:
    """`tokenize` for texts already in Python's hands, one document each."""
    workers = _cores() if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers: {workers} cannot encode; give 1 or more")
    encoder = _without_truncation(load_tokenizer(tokenizer))
    ending = [_end_of_document(encoder, eod_id)] if append_eod else []
    dtype = token_dtype(encoder.get_vocab_size())
    text_bytes = 0
    with (
        IndexedDatasetWriter(out_prefix, dtype) as writer,
        closing(_encode_all(texts, encoder, ending, workers)) as chunks,
    ):
        for chunk in chunks:
            writer.add_documents(chunk.tokens, chunk.sizes)
            text_bytes += chunk.text_bytes
            if progress is not None:
                progress(writer.num_documents, writer.num_tokens, text_bytes)
        if writer.num_documents == 0:
            raise ValueError(f"no text to tokenize for {writer.prefix}: the inputs are empty")
    return TokenizedData(writer.prefix, writer.num_documents, writer.num_tokens, dtype)


class _Encoded(NamedTuple):
    """A chunk of texts as tokens: end to end, with the length of each document that has any."""

    tokens: NDArray[np.int32]
    sizes: NDArray[np.int64]
    text_bytes: int


def _encode(encoder: Tokenizer, ending: list[int], texts: list[str]) -> _Encoded:
    encodings = encoder.encode_batch_fast(texts)
    documents = [ids + ending for encoding in encodings if (ids := encoding.ids)]
    sizes = np.array([len(document) for document in documents], np.int64)
    tokens = np.fromiter(chain.from_iterable(documents), np.int32, count=int(sizes.sum()))
    return _Encoded(tokens, sizes, sum(len(text.encode()) for text in texts))


def _encode_all(
    texts: Iterable[str], encoder: Tokenizer, ending: list[int], workers: int
) -> Generator[_Encoded, None, None]:
    """The chunks in the order of the texts, a few of them under way at any time."""
    waiting: deque[Future[_Encoded]] = deque()
    pool = _threads if workers <= THREADS_AT_MOST else _processes
    with pool(workers, encoder, ending) as submit:
        try:
            for chunk in _chunks(texts):
                waiting.append(submit(chunk))
                if len(waiting) > _CHUNKS_AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


Submit = Callable[[list[str]], "Future[_Encoded]"]


@contextmanager
def _threads(workers: int, encoder: Tokenizer, ending: list[int]) -> Iterator[Submit]:
    """Threads of this process, which the tokenizers library lets run while it encodes."""
    with _one_core_a_call(), ThreadPoolExecutor(workers) as executor:
        yield lambda texts: executor.submit(_encode, encoder, ending, texts)


@contextmanager
def _processes(workers: int, encoder: Tokenizer, ending: list[int]) -> Iterator[Submit]:
    """Processes, started afresh: a fork of one that runs threads, as JAX does, may hang."""
    given = (encoder.to_str(), ending)
    executor: Executor
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_process, given) as executor:
        try:
            yield lambda texts: executor.submit(_encode_in_process, texts)
        except BrokenProcessPool:
            raise RuntimeError(
                f"one of {workers} encoding processes ended: killed for want of memory, or the "
                'script that tokenizes does not do so under `if __name__ == "__main__":`; fewer '
                f"workers take less memory, and up to {THREADS_AT_MOST} start no processes"
            ) from None


_in_process: tuple[Tokenizer, list[int]]


def _start_process(tokenizer: str, ending: list[int]) -> None:
    global _in_process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    os.environ[_SERIAL] = "false"
    _in_process = Tokenizer.from_str(tokenizer), ending


def _encode_in_process(texts: list[str]) -> _Encoded:
    return _encode(*_in_process, texts)


@contextmanager
def _one_core_a_call() -> Iterator[None]:
    """Has the library encode each batch on the thread that asks for it.

    Its own threads would be as many as there are cores, started once for good, whatever number of
    workers is asked for; and they stand still while ids are taken out of what they encoded.
    """
    before = os.environ.get(_SERIAL)
    os.environ[_SERIAL] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SERIAL]
        else:
            os.environ[_SERIAL] = before


def _cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in groups of at most about half a million characters; a longer text is alone."""
    chunk: list[str] = []
    characters = 0
    for text in texts:
        if chunk and characters + len(text) > _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
        chunk.append(text)
        characters += len(text) + 1  # an empty text takes room too
    if chunk:
        yield chunk


def load_tokenizer(tokenizer: PathLike | Tokenizer) -> Tokenizer:
    """A tokenizer from a `tokenizer.json`, a folder that holds one, or the Hugging Face hub.

    Args:
        tokenizer: a path; or, where there is no such path, a hub id (`EleutherAI/pythia-70m`, with
            `@revision` after it if not `main`); a `Tokenizer` is returned as it is.

    Raises:
        FileNotFoundError: there is no such file, here or on the hub.
        ValueError: the file is not a tokenizer.
        RuntimeError: a hub id is given and huggingface_hub is not installed.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    path = Path(tokenizer)
    if not path.exists() and path.suffix != ".json" and (hub := _HUB_ID.fullmatch(str(tokenizer))):
        path = _from_hub(hub["repo"], hub["revision"])
    elif path.is_dir():
        path /= "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; a tokenizer is a tokenizer.json, a folder that holds one, or "
            "a hub id (organization/name)"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"{path}: not a tokenizer in the format of the tokenizers library: {error}"
        ) from None


def _from_hub(repo: str, revision: str | None) -> Path:
    """The tokenizer.json of a repository on the hub, or of huggingface_hub's cache of it."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError:
        raise RuntimeError(
            f"{repo}: no such file or folder here, and to fetch it from the Hugging Face hub takes "
            "huggingface_hub: pip install 'pythia-jax[hf]'"
        ) from None
    try:
        return Path(hf_hub_download(repo, "tokenizer.json", revision=revision))
    except (OSError, ValueError, EntryNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{repo}: no such file or folder here, and the Hugging Face hub gave no tokenizer.json "
            f"of that name: {reason}"
        ) from None


def _without_truncation(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, or a copy that neither cuts nor pads where its file says that it should."""
    if tokenizer.truncation is None and tokenizer.padding is None:
        return tokenizer
    whole = Tokenizer.from_str(tokenizer.to_str())
    whole.no_truncation()
    whole.no_padding()
    return whole


def _end_of_document(tokenizer: Tokenizer, eod_id: int | None) -> int:
    found = tokenizer.token_to_id(EOD_TOKEN) if eod_id is None else eod_id
    if found is None:
        raise ValueError(
            f"append_eod (--append-eod): the tokenizer has no {EOD_TOKEN}; take one that has it, "
            "leave documents without an end, or, in Python, name the id to append as eod_id"
        )
    return found
