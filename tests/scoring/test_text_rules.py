"""The four indicators of rule-based quality, against counts by hand and by splitting."""

import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark_jax.scoring.text_rules import COLUMNS, indicator_columns, text_indicators


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Check: 2 + 2 = 4, since I might verify.", (10, 2, 1, 1)),
        ("CHECK check, (verify) re-check", (4, 4, 0, 0)),
        ("checking verified mighty sincerely perhapsed thereforeth", (6, 0, 0, 0)),
        ("Therefore\n\nsince\tperhaps", (3, 0, 1, 2)),
        ("$x_{might}$ \\text{since} and_since", (3, 0, 1, 1)),  # an underscore belongs to a word, a brace does not
        ("", (0, 0, 0, 0)),
        (" \n ", (0, 0, 0, 0)),
    ],
)
def test_keywords_are_whole_words_of_any_case_per_word_between_spaces(text: str, expected: tuple) -> None:
    found = text_indicators(text)
    words, *counts = expected
    assert found["rule_words"] == words
    assert [found[name] for name in COLUMNS[1:]] == [count / max(words, 1) for count in counts]


@given(
    st.lists(
        st.sampled_from(["check", "Verify", "perhaps", "MIGHT", "therefore", "since", "checks", "a", "9"])
        | st.text(string.digits, min_size=1),
        max_size=40,
    )
)
def test_columns_of_many_texts_equal_counts_of_their_split_words(words: list[str]) -> None:
    lowered = [word.lower() for word in words]
    groups = (("check", "verify"), ("perhaps", "might"), ("therefore", "since"))
    expected = [len(words), *(sum(w in group for w in lowered) / max(len(words), 1) for group in groups)]
    columns = indicator_columns([" ".join(words), "therefore", "\n".join(words)])
    for name, value in zip(COLUMNS, expected, strict=True):
        np.testing.assert_array_equal(columns[name][[0, 2]], value)
