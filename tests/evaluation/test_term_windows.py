"""What is counted in decoded rows is what upstream's regular expressions find in them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from term_texts import numeric_text, upstream_counts, write_tokenizer
from tokenizers import Tokenizer, decoders, models

from pythia_jax.evaluation.term_windows import (
    UNITS,
    TermCounts,
    count_texts,
    decoder,
    merged,
    number_key,
    pair_key,
    unit_key,
)

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "20B_tokenizer.json"


def tokenizer_of(kind: str, folder: Path) -> Tokenizer:
    if kind == "made here":
        return Tokenizer.from_file(str(write_tokenizer(folder)))
    if not PUBLISHED.is_file():
        pytest.skip("the published tokenizer is not here")
    return Tokenizer.from_file(str(PUBLISHED))


@pytest.fixture(params=["made here", "published"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return tokenizer_of(request.param, tmp_path)


def rows_of(tokenizer: Tokenizer, rows: int, width: int) -> np.ndarray:
    """Rows of text of many kinds, cut anywhere, inside characters too."""
    here = Path(__file__).parents[2]
    prose = "\n".join(path.read_text("utf-8") for path in sorted(here.glob("pythia_jax/*/*.py")))
    ids = [*tokenizer.encode(prose).ids, *tokenizer.encode(numeric_text(1, 150_000)).ids]
    # Over and over, shifted, if that is not enough.
    return np.resize(np.array(ids, np.int32), rows * width).reshape(rows, width)


def test_counts_of_a_thousand_decoded_rows_equal_those_of_upstreams_expressions(
    tokenizer: Tokenizer,
) -> None:
    rows = rows_of(tokenizer, 1000, 2049)
    texts = [tokenizer.decode(row.tolist(), skip_special_tokens=False) for row in rows]
    expected = upstream_counts(texts)
    assert len(expected) > 1000 and any(key.endswith("-day") for key in expected)
    decode = decoder(tokenizer)
    found = count_texts(map(decode, rows))
    assert found.as_dict() == expected
    assert found.rows == 1000


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet=" 1234567٣_a.é—\n\u00a0²", max_size=40), st.sampled_from(UNITS))
def test_counts_of_any_text_equal_those_of_upstreams_expressions(text: str, unit: str) -> None:
    for whole in (text, text.replace("a", f" {unit}"), f"12 {text} {unit} 3 {text}"):
        assert count_texts([whole]).as_dict() == upstream_counts([whole])


def test_a_window_of_numbers_takes_all_it_can_reach() -> None:
    counts = count_texts(["Q: 24 times 18 is 432, 7 of"])
    # From 24: `24 times 18 is 432`, three words on; from 18: `18 is 432, 7`.
    assert [counts.number(n) for n in (24, 18, 432, 7)] == [1, 2, 2, 1]
    assert counts.pair(18, 24) == counts.pair(24, 18) == 1
    assert (counts.pair(18, 432), counts.pair(24, 7)) == (2, 0)
    assert counts.as_dict()["18-24"] == 1


def test_a_number_alone_is_not_counted_and_with_a_unit_only_so() -> None:
    assert count_texts(["there were 15 of them"]).as_dict() == {}
    counts = count_texts(["for 15 whole days"])
    assert counts.as_dict() == {"15-day": 1}
    assert (counts.with_unit(15, "day"), counts.with_unit(15, "hour"), counts.number(15)) == (
        1,
        0,
        0,
    )


def test_no_window_reaches_from_one_row_into_the_next() -> None:
    assert count_texts(["5 and", "6 and 7"]).as_dict() == {"6": 1, "7": 1, "6-7": 1}


def test_a_line_of_underscores_is_passed_in_no_time() -> None:
    # Upstream's own expression would take 2**300 steps here.
    assert count_texts([f"5 {'_' * 300}— 6"]).as_dict() == {}


def test_cleaning_up_is_what_transformers_did_to_decoded_text() -> None:
    from transformers import PreTrainedTokenizerFast

    texts = ["5 , 6 and 7 . 8 and", "do n't 5 's 6 ' 7 hour ? 5 ! 're 've 'm 9"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    clean = [tokenizer.clean_up_tokenization(text) for text in texts]
    expected = upstream_counts(clean)
    assert count_texts(texts, clean_up=True).as_dict() == expected
    assert count_texts(texts).as_dict() == upstream_counts(texts) != expected


def test_decoding_equals_the_librarys_for_any_ids(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    decode, size = decoder(tokenizer), tokenizer.get_vocab_size()
    for ids in (
        *rng.integers(0, size + 40, (300, 64)),  # unknown ones, and halves of characters
        np.arange(size + 3),
        np.zeros(0, int),
    ):
        assert decode(ids) == tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def test_a_tokenizer_with_another_decoder_decodes_itself(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("made here", tmp_path)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip("1", 1, 0)])
    ids = np.array(tokenizer.encode("12 of 3").ids)
    assert decoder(tokenizer)(ids) == tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def test_counts_of_parts_add_up_to_those_of_the_whole() -> None:
    texts = [numeric_text(seed, 80) for seed in range(20)]
    parts = [count_texts(texts[:3]), count_texts([]), count_texts(texts[3:19]), count_texts(["no"])]
    whole = count_texts([*texts[:19], "no"])
    added = merged(parts)
    assert added.as_dict() == whole.as_dict()
    assert added.rows == whole.rows == 20
    assert np.all(np.diff(added.keys) > 0)
    assert merged([]).as_dict() == {} and merged([]).rows == 0


def test_keys_tell_everything_apart() -> None:
    keys = [number_key(n) for n in (0, 1, 99_999)]
    keys += [pair_key(a, b) for a, b in ((0, 0), (0, 1), (1, 99_999), (99_999, 99_999))]
    keys += [unit_key(n, unit) for n in (0, 99_999) for unit in UNITS]
    assert len(set(keys)) == len(keys)
    counts = TermCounts(np.sort(keys), np.arange(1, len(keys) + 1), 1)
    names = counts.as_dict()
    assert len(names) == len(keys) and {"0", "0-0", "1-99999", "99999-decade"} <= names.keys()


def test_what_is_never_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="100000 is not counted"):
        number_key(100_000)
    with pytest.raises(ValueError, match="-1 is not counted"):
        pair_key(3, -1)
    with pytest.raises(ValueError, match=r"'second'.*minute, hour"):
        unit_key(3, "second")
