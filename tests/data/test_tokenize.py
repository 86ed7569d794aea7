"""Text to tokens: which documents come out of which inputs, and what stops it."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pythia_jax.data import load_tokenizer, open, read_texts, tokenize, tokenize_texts

TEXTS = ["the cat sat on the mat", "a dog", "schöne Grüße\r\nfrom   here", "the end"]


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE of 300 entries, in which every text can be written."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS * 5, trainer)
    return made


def documents_of(prefix):
    dataset = open(prefix)
    return [dataset[i].tolist() for i in range(len(dataset))]


def texts_of(prefix, tokenizer):
    return [tokenizer.decode(document) for document in documents_of(prefix)]


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_texts_come_back_one_document_each(tmp_path, tokenizer):
    made = tokenize_texts(TEXTS, tmp_path / "out", tokenizer)
    assert texts_of(tmp_path / "out", tokenizer) == TEXTS
    assert documents_of(tmp_path / "out") == [tokenizer.encode(text).ids for text in TEXTS]
    assert (made.prefix, made.documents, made.dtype.name) == (tmp_path / "out", 4, "uint16")
    assert made.tokens == open(made.prefix).num_tokens


def test_files_keep_their_order_and_their_line_ends(tmp_path, tokenizer):
    paths = [tmp_path / name for name in ("z.txt", "a.txt")]
    for path, text in zip(paths, TEXTS[2:], strict=True):
        path.write_bytes(text.encode())
    tokenize(paths, tmp_path / "out", tokenizer)
    assert texts_of(tmp_path / "out", tokenizer) == TEXTS[2:]
    tokenize(str(paths[0]), tmp_path / "one", tokenizer)
    assert texts_of(tmp_path / "one", tokenizer) == TEXTS[2:3]


def test_a_folder_is_read_sorted_and_whole_but_for_hidden_and_binary_files(tmp_path):
    folder = tmp_path / ".cache" / "texts"
    for name, content in {
        "b/two.md": b"two",
        "a.txt": b"one",
        "c.jsonl": b'{"text": "three"}\n{"text": "four"}\n',
        "d-latin1.txt": "fünf".encode("latin-1"),
        "e.pyc": b"\x00\x01",
        ".git/config": b"hidden",
        "b/.secret": b"hidden",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert list(read_texts(folder)) == ["one", "two", "three", "four", "f\ufffdnf"]
    assert list(read_texts(folder, pattern="*.md")) == ["two"]


def test_json_lines_give_a_document_a_line(tmp_path, tokenizer):
    path = write_lines(tmp_path / "d.jsonl", *({"text": t, "meta": 1} for t in TEXTS))
    path.write_text(path.read_text() + "\n")
    tokenize(path, tmp_path / "out", tokenizer)
    assert texts_of(tmp_path / "out", tokenizer) == TEXTS


def test_text_key_chooses_the_text(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", {"text": "no", "body": "yes"})
    assert list(read_texts(path, text_key="body")) == ["yes"]


def test_empty_texts_are_dropped_with_and_without_eod(tmp_path, tokenizer):
    for append_eod in (False, True):
        made = tokenize_texts(["", "a", ""], tmp_path / "out", tokenizer, append_eod=append_eod)
        assert made.documents == 1
        assert made.tokens == 1 + append_eod


def test_eod_ends_every_document(tmp_path, tokenizer):
    tokenize_texts(TEXTS, tmp_path / "out", tokenizer, append_eod=True)
    assert documents_of(tmp_path / "out") == [[*tokenizer.encode(t).ids, 0] for t in TEXTS]
    tokenize_texts(TEXTS, tmp_path / "out", tokenizer, append_eod=True, eod_id=1)
    assert all(document[-1] == 1 for document in documents_of(tmp_path / "out"))


def test_no_eod_in_the_tokenizer_is_an_error_only_when_asked_for(tmp_path):
    plain = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    assert tokenize_texts(["a"], tmp_path / "out", plain).documents == 1
    with pytest.raises(ValueError, match=r"no <\|endoftext\|>; name the id .* eod_id"):
        tokenize_texts(["a"], tmp_path / "eod", plain, append_eod=True)
    assert not list(tmp_path.glob("eod*"))


def test_special_tokens_written_in_a_text_become_tokens_as_upstream(tmp_path, tokenizer):
    tokenize_texts(["a<|endoftext|>a"], tmp_path / "out", tokenizer)
    [[first, middle, last]] = documents_of(tmp_path / "out")
    assert (middle, first) == (0, last)


def test_truncation_and_padding_of_the_tokenizer_are_ignored(tmp_path, tokenizer):
    cutting = Tokenizer.from_str(tokenizer.to_str())
    cutting.enable_truncation(max_length=2)
    cutting.enable_padding(length=50)
    tokenize_texts(TEXTS, tmp_path / "out", cutting)
    assert texts_of(tmp_path / "out", tokenizer) == TEXTS
    assert cutting.truncation is not None


@pytest.mark.parametrize(("entries", "dtype"), [(65499, "uint16"), (65500, "int32")])
def test_dtype_follows_the_vocabulary(tmp_path, entries, dtype):
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(entries)}, unk_token="w0"))
    assert tokenize_texts([f"w{entries - 1}"], tmp_path / "out", words).dtype == dtype
    assert documents_of(tmp_path / "out") == [[entries - 1]]


def test_many_chunks_equal_one(tmp_path, tokenizer, monkeypatch):
    tokenize_texts(TEXTS * 3, tmp_path / "whole", tokenizer)
    monkeypatch.setitem(tokenize_texts.__globals__, "_CHUNK_CHARACTERS", 30)
    seen = []
    tokenize_texts(
        iter(TEXTS * 3), tmp_path / "chunks", tokenizer, progress=lambda *done: seen.append(done)
    )
    for suffix in (".bin", ".idx"):
        whole = (tmp_path / "whole").with_suffix(suffix).read_bytes()
        assert (tmp_path / "chunks").with_suffix(suffix).read_bytes() == whole
    assert len(seen) > 3
    assert seen == sorted(seen)
    assert seen[-1] == (12, open(tmp_path / "whole").num_tokens)


def test_tokenizer_comes_from_a_file_a_folder_or_as_it_is(tmp_path, tokenizer):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    for source in (path, str(path), tmp_path, tokenizer):
        assert load_tokenizer(source).get_vocab() == tokenizer.get_vocab()


def test_bad_tokenizers_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json: no such file"):
        load_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b'{"text": "a"}\n{"text": \n', r"d.jsonl:2: not a line of JSON text"),
        ("d.jsonl", b'{"text": "\xff"}\n', r"d.jsonl:1: .* can't decode byte"),
        ("d.jsonl", b'{"text": "\\ud800"}\n', r"d.jsonl:1: .* surrogates not allowed"),
        ("d.jsonl", b'{"body": "a"}\n', r"d.jsonl:1: .* no text under 'text' \(keys: body\)"),
        ("d.jsonl", b'{"text": 3}\n', r"d.jsonl:1: .* no text under 'text'"),
        ("d.jsonl", b'["a"]\n', r"d.jsonl:1: .* expected an object with a key 'text'"),
        ("d.txt", b"ab\xff", r"d.txt: not UTF-8 text \(byte 2"),
        ("d.txt", b"", r"no text to tokenize"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(tmp_path, tokenizer, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tokenize([path], tmp_path / "out", tokenizer)
    assert list(tmp_path.iterdir()) == [path]


def test_missing_input_is_named(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match="gone: no such file or folder"):
        tokenize([Path("gone")], tmp_path / "out", tokenizer)
    assert list(tmp_path.iterdir()) == []
