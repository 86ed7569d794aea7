"""The bytes that each token of a byte-level tokenizer stands for.

Of such a tokenizer, as GPT-2's and Pythia's, the text of a row is the bytes of its tokens, end to
end, decoded as UTF-8.
"""

from tokenizers import Tokenizer, decoders, pre_tokenizers


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether `bytes_of_tokens` is what this tokenizer decodes."""
    return isinstance(tokenizer.decoder, decoders.ByteLevel)


def bytes_of_tokens(tokenizer: Tokenizer, *, special: bool = True) -> list[bytes]:
    """The bytes of each id from 0 to the largest; none of an id that the tokenizer has not.

    special: whether special tokens stand for any.

    As the tokenizers library's byte-level decoder has it: each character of a token is one byte,
    unless one of them is none of its 256, in an added token: then the token is its own text.
    """
    byte_of = _bytes_of_characters()
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    found = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, number in vocabulary.items():
        if not special and number in added and added[number].special:
            continue
        try:
            found[number] = bytes(byte_of[character] for character in token)
        except KeyError:
            found[number] = token.encode()
    return found


def _bytes_of_characters() -> dict[str, int]:
    """The alphabet of 256 characters: those of Latin-1 that can be seen are their own bytes, the
    other bytes follow from U+0100 on."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = [ord(character) for character in characters if ord(character) < 256]
    others = [byte for byte in range(256) if byte not in own]
    return dict(zip(characters, [*own, *others], strict=True))
