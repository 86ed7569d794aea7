"""From text to a `.bin/.idx` dataset: text files, folders and JSON lines, one document at a time.

As GPT-NeoX's tools/preprocess_data.py: one document of the dataset for every document of text,
those that give no tokens dropped, an end-of-document token only when asked for (Pythia's own data
has none). Special tokens written out in a text (`<|endoftext|>`) become those tokens.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from pythia_jax.data.indexed import IndexedDatasetWriter, token_dtype

EOD_TOKEN = "<|endoftext|>"
_CHUNK_CHARACTERS = 1 << 21  # text encoded together: bounds memory, and feeds every core

PathLike = str | os.PathLike[str]


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
    progress: Callable[[int, int], None] | None = None,
) -> TokenizedData:
    """Tokenizes files into the dataset `out_prefix.bin` and `out_prefix.idx`.

    Encodes on all cores (`RAYON_NUM_THREADS` limits them) in chunks of bounded memory. Tokens are
    uint16 if the vocabulary has fewer than 65500 entries, else int32. If anything fails, nothing
    is written.

    Args:
        inputs: files and folders, read as `read_texts` says.
        out_prefix: path of the dataset without suffix; missing folders are made.
        tokenizer: see `load_tokenizer`.
        append_eod: end every document with the end-of-document token.
        eod_id: that token; `<|endoftext|>` of the tokenizer by default.
        text_key: where a JSON line keeps its text.
        pattern: which files of a folder to read (`*.py`).
        progress: called after every chunk with the documents and tokens so far.

    Raises:
        FileNotFoundError: an input or the tokenizer is missing.
        ValueError: an input cannot be read, holds no text, or there is no end-of-document token.
    """
    texts = read_texts(inputs, text_key=text_key, pattern=pattern)
    return tokenize_texts(
        texts, out_prefix, tokenizer, append_eod=append_eod, eod_id=eod_id, progress=progress
    )


def tokenize_texts(
    texts: Iterable[str],
    out_prefix: PathLike,
    tokenizer: PathLike | Tokenizer,
    *,
    append_eod: bool = False,
    eod_id: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TokenizedData:
    """`tokenize` for texts already in Python's hands, one document each."""
    encoder = _without_truncation(load_tokenizer(tokenizer))
    ending = [_end_of_document(encoder, eod_id)] if append_eod else []
    dtype = token_dtype(encoder.get_vocab_size())
    with IndexedDatasetWriter(out_prefix, dtype) as writer:
        for chunk in _chunks(texts):
            encodings = encoder.encode_batch_fast(chunk)
            documents = [ids + ending for encoding in encodings if (ids := encoding.ids)]
            sizes = [len(document) for document in documents]
            flat = np.fromiter(chain.from_iterable(documents), np.int64, count=sum(sizes))
            writer.add_documents(flat, sizes)
            if progress is not None:
                progress(writer.num_documents, writer.num_tokens)
        if writer.num_documents == 0:
            raise ValueError(f"no text to tokenize for {writer.prefix}: the inputs are empty")
    return TokenizedData(writer.prefix, writer.num_documents, writer.num_tokens, dtype)


def load_tokenizer(tokenizer: PathLike | Tokenizer) -> Tokenizer:
    """A tokenizer from a `tokenizer.json` or a folder that holds one; a `Tokenizer` is returned.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a tokenizer.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    path = Path(tokenizer)
    if path.is_dir():
        path /= "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; a tokenizer is a tokenizer.json or a folder that holds one"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"{path}: not a tokenizer in the format of the tokenizers library: {error}"
        ) from None


def read_texts(
    inputs: PathLike | Iterable[PathLike], *, text_key: str = "text", pattern: str = "*"
) -> Iterator[str]:
    """The documents of files and folders, one at a time, in the order given.

    A file is one document, a `.jsonl` file one a line, its text under `text_key`. A folder is read
    with all below it, sorted by path, without hidden files. Text is UTF-8, line ends are kept. A
    file named directly must be readable so; in a folder, where one odd file among thousands should
    not stop the rest, files holding NUL bytes are taken for binary and left out, and bytes that
    are not UTF-8 become U+FFFD.

    Raises:
        FileNotFoundError: an input does not exist.
        ValueError: a file is not UTF-8, or a JSON line not what was expected (file:line).
    """
    for path in _as_paths(inputs):
        if path.is_dir():
            for file in _files_below(path, pattern):
                yield from _read_file(file, text_key, lenient=True)
        elif path.exists():
            yield from _read_file(path, text_key, lenient=False)
        else:
            raise FileNotFoundError(f"{path}: no such file or folder to tokenize")


def _as_paths(inputs: PathLike | Iterable[PathLike]) -> list[Path]:
    if isinstance(inputs, str | os.PathLike):
        return [Path(inputs)]
    return [Path(path) for path in inputs]


def _files_below(folder: Path, pattern: str) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob(pattern)
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _read_file(path: Path, text_key: str, lenient: bool) -> Iterator[str]:
    if path.suffix == ".jsonl":
        yield from _read_json_lines(path, text_key)
        return
    content = path.read_bytes()
    if lenient and b"\x00" in content:
        return
    try:
        yield content.decode("utf-8", errors="replace" if lenient else "strict")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text (byte {error.start}: {error.reason}); convert it first"
        ) from None


def _read_json_lines(path: Path, text_key: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                text = _text_of(json.loads(line), text_key)
            except ValueError as error:  # of JSON, of UTF-8, or of what it holds
                raise ValueError(f"{path}:{number}: not a line of JSON text: {error}") from None
            yield text


def _text_of(record: object, text_key: str) -> str:
    """The text of one parsed JSON line."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with a key {text_key!r}, found {record!r:.80}")
    text = record.get(text_key)
    if not isinstance(text, str):
        raise ValueError(f"no text under {text_key!r} (keys: {', '.join(record)}); see text_key")
    text.encode()  # a lone surrogate, which JSON can escape, is no text
    return text


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in groups of at most about two million characters; a longer text is alone."""
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
            f"append_eod: the tokenizer has no {EOD_TOKEN}; name the id to append as eod_id"
        )
    return found
