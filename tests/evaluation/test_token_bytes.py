"""The bytes of tokens, held against the tokenizers library's own encoder and decoder."""

import bpe
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pythia_jax.evaluation.token_bytes import bytes_of_tokens, is_byte_level

TEXT = "he said 12 of — naïve 日本語 🙂\n\t\u00a0" * 3


@pytest.fixture(scope="module", params=["small", "pythias"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return bpe.pythias() if request.param == "pythias" else bpe.small([TEXT])


def test_joined_they_are_what_the_library_decodes(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(9)
    for special in (True, False):
        known = bytes_of_tokens(tokenizer, special=special)
        assert len(known) == tokenizer.get_vocab_size()
        for _ in range(50):
            ids = [*rng.integers(0, len(known), 40).tolist(), 0, 1]
            text = b"".join(known[i] for i in ids).decode("utf-8", "replace")
            assert text == tokenizer.decode(ids, skip_special_tokens=not special)


def test_each_byte_that_text_can_hold_is_that_of_its_character() -> None:
    """By the library's encoder: the tokens of a text are its bytes, whatever they are."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    known = bytes_of_tokens(tokenizer)
    assert sorted(known) == [bytes([byte]) for byte in range(256)]
    text = "".join(
        map(chr, [*range(0x800), *range(0x800, 0xD800, 97), *range(0x10000, 0x10FFFF, 997)])
    )
    ids = tokenizer.encode(text).ids
    assert [known[i] for i in ids] == [bytes([byte]) for byte in text.encode()]


def test_another_kind_of_tokenizer_is_told_from_it(tokenizer: Tokenizer) -> None:
    assert is_byte_level(tokenizer)
    assert not is_byte_level(Tokenizer(models.WordLevel({"he": 0}, "he")))
    sequence = Tokenizer.from_str(tokenizer.to_str())
    sequence.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip("1", 1, 0)])
    assert not is_byte_level(sequence)
