"""Texts read from files: plain text, JSON lines, folders of both; as they are, `.gz` or `.zst`."""

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import zstandard

PathLike = str | os.PathLike[str]

JSON_LINES = ".jsonl"
COMPRESSED = (".gz", ".zst")
_PACKED_PIECE = 1 << 10  # bytes unpacked together: of the most repetitive text, 12 MB
_LARGEST_WINDOW = 1 << 31  # of `zstd --long=31`
_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)


class _File(NamedTuple):
    path: Path
    in_folder: bool  # found below a folder, not named by the caller


class Texts:
    """The documents of files and folders, one at a time, in the order given; see `read_texts`.

    May be read several times. While it is, `bytes_read` says how far that has come in `size`, the
    bytes of all files as they lie on disk.
    """

    def __init__(
        self, inputs: PathLike | Iterable[PathLike], *, text_key: str = "text", pattern: str = "*"
    ):
        self.text_key = text_key
        self.files = [file for path in _as_paths(inputs) for file in _files_of(path, pattern)]
        self.size = sum(file.path.stat().st_size for file in self.files)
        self.bytes_read = 0

    def __iter__(self) -> Iterator[str]:
        before = 0
        for file in self.files:
            with file.path.open("rb") as raw:
                for text in self._texts_of(file, raw):
                    self.bytes_read = before + _position(raw)
                    yield text
                before = self.bytes_read = before + _position(raw)

    def _texts_of(self, file: _File, raw: io.BufferedReader) -> Iterator[str]:
        path = file.path
        name = path.name.removesuffix(path.suffix) if path.suffix in COMPRESSED else path.name
        if name.endswith(JSON_LINES):
            yield from self._json_lines(path, raw)
            return
        try:
            content = _unpacked(path, raw).read()
        except _DAMAGE as error:
            raise ValueError(_damaged(path, error)) from None
        if file.in_folder and b"\x00" in content:
            return
        try:
            yield content.decode("utf-8", errors="replace" if file.in_folder else "strict")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: not UTF-8 text (byte {error.start}: {error.reason}); convert it first"
            ) from None

    def _json_lines(self, path: Path, raw: io.BufferedReader) -> Iterator[str]:
        number = 0
        try:
            for number, line in enumerate(_unpacked(path, raw), start=1):  # noqa: B007
                if not line.isspace():
                    yield _text_of(json.loads(line), self.text_key)
        except _DAMAGE as error:
            raise ValueError(_damaged(f"{path}:{number + 1}", error)) from None
        except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, or of what it holds
            raise ValueError(f"{path}:{number}: not a line of JSON text: {error}") from None


def read_texts(
    inputs: PathLike | Iterable[PathLike], *, text_key: str = "text", pattern: str = "*"
) -> Texts:
    """The documents of files and folders, one at a time, in the order given.

    A file is one document; a `.jsonl` file one a line, its text under `text_key`. Either may be
    packed (`.jsonl.zst`, `.txt.gz`) and is unpacked as it is read. A folder is read with all below
    it, sorted by path, without hidden files. Text is UTF-8, line ends are kept. A file named
    directly must be readable so; in a folder, where one odd file among thousands should not stop
    the rest, files holding NUL bytes are taken for binary and left out, and bytes that are not
    UTF-8 become U+FFFD. Memory: one document of text at a time.

    Raises:
        FileNotFoundError: an input does not exist; told at once.
        ValueError: told while reading: a file is not UTF-8, or packed and damaged, or a JSON line
            is not what was expected; the message names file and line.
    """
    return Texts(inputs, text_key=text_key, pattern=pattern)


class _ZstandardReader(io.RawIOBase):
    """Unpacks zstandard, frame after frame, as it is read.

    The library's own reader takes a file that was cut short for one that ends there.
    """

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._packed = b""  # read from the file, and not given to a frame yet
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._unpacked:
            packed = self._packed or self._file.read(_PACKED_PIECE)
            if not packed and self._frame is None:
                return 0
            if not packed:
                raise EOFError("it ends in the middle of a frame")
            if self._frame is None:
                decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
                self._frame = decompressor.decompressobj()
            self._unpacked = memoryview(self._frame.decompress(packed))
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._unpacked))
        buffer[:count] = self._unpacked[:count]
        self._unpacked = self._unpacked[count:]
        return count


def _unpacked(path: Path, raw: io.BufferedReader) -> IO[bytes] | gzip.GzipFile:
    if path.suffix in COMPRESSED and not raw.peek(1):
        raise EOFError("it is empty")
    match path.suffix:
        case ".gz":
            return gzip.GzipFile(fileobj=raw)
        case ".zst":
            return io.BufferedReader(_ZstandardReader(raw), 1 << 16)
        case _:
            return raw


def _damaged(place: PathLike, error: Exception) -> str:
    return f"{place}: cannot be unpacked: {error}; truncated or damaged, copy it again"


def _position(raw: io.BufferedReader) -> int:
    return raw.tell() if raw.seekable() else 0  # a pipe has neither size nor place


def _text_of(record: object, text_key: str) -> str:
    """The text of one parsed JSON line."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with a key {text_key!r}, found {record!r:.80}")
    text = record.get(text_key)
    if not isinstance(text, str):
        raise ValueError(f"no text under {text_key!r} (keys: {', '.join(record)}); see text_key")
    text.encode()  # a lone surrogate, which JSON can escape, is no text
    return text


def _as_paths(inputs: PathLike | Iterable[PathLike]) -> list[Path]:
    if isinstance(inputs, str | os.PathLike):
        return [Path(inputs)]
    return [Path(path) for path in inputs]


def _files_of(path: Path, pattern: str) -> list[_File]:
    if path.is_dir():
        below = (file for file in path.rglob(pattern) if file.is_file())
        return [_File(f, True) for f in sorted(below) if not _hidden(f.relative_to(path))]
    if path.exists():
        return [_File(path, False)]
    raise FileNotFoundError(f"{path}: no such file or folder to tokenize")


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
