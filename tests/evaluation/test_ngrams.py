import itertools
import random
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark_jax.evaluation.ngrams import jaccard_rows, normalize_problem


def grams(text):
    return {text[start : start + 8] for start in range(max(1, len(text) - 7))}


def jaccard(first, second):
    return len(grams(first) & grams(second)) / len(grams(first) | grams(second))


TEXTS = st.lists(st.text(alphabet=st.sampled_from("ab \x00é𝔘\ud800"), max_size=24), min_size=1, max_size=6)


@given(queries=TEXTS, corpus=TEXTS)
def test_indices_are_those_of_python_sets(queries, corpus):
    """A small alphabet makes grams repeat, within a text and across; texts may be empty or shorter than a gram."""
    found = np.array(list(jaccard_rows(queries, corpus)))
    assert found.shape == (len(queries), len(corpus))
    np.testing.assert_array_equal(found, [[jaccard(query, text) for text in corpus] for query in queries])


def test_indices_of_long_texts_are_those_of_python_sets():
    rng = random.Random()
    words = ["find", "the", "value", "of", "$x^2$", "if", "\\frac{1}{2}", "triangle", "7", "12", "∠ABC"]
    corpus, queries = ([" ".join(rng.choices(words, k=rng.randrange(1, 60))) for _ in range(n)] for n in (41, 13))
    found = np.array(list(jaccard_rows(queries, corpus)))
    np.testing.assert_array_equal(found, [[jaccard(query, text) for text in corpus] for query in queries])
    assert 0 < np.count_nonzero(found) < found.size


def test_neighbours_in_the_corpus_share_no_grams_across_their_border():
    assert next(jaccard_rows(["ABCDEFGH"], ["xxxxABCD", "EFGHyyyy"])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Find  $X$\n\tnow ", "find $x$ now"),
        (r"3\,000 and 4\!\;\:5\>6", "3000 and 456"),
        (r"a\quad b\qquad\text{c}", r"a b \text{c}"),
        (r"a\hspace{2 cm}b\vspace*{1em}c\ d~e", "a b c d e"),
        (r"x \\, y", r"x \\, y"),  # a line break and a comma
        (r"\\\,z", r"\\z"),
        (r"\thinspace 5 \quadrant \spaces \negthickspace7", r"5 \quadrant \spaces 7"),
        (r"pe\~na", r"pe\~na"),
        ("", ""),
    ],
)
def test_normalisation_strips_spacing_macros_and_nothing_else(text, normal):
    assert normalize_problem(text) == normal
    assert normalize_problem(normal) == normal


def test_811_problems_against_5000_take_less_than_a_minute(capsys):
    rng = random.Random()
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz{}\\$^", k=rng.randrange(1, 9))) for _ in range(3_000)]
    cumulative = list(itertools.accumulate(1 / rank for rank in range(1, len(words) + 1)))  # as in language
    texts = [" ".join(rng.choices(words, cum_weights=cumulative, k=80)) for _ in range(5_811)]
    start = time.process_time()
    rows = list(jaccard_rows(texts[:811], texts[811:]))
    seconds = time.process_time() - start
    with capsys.disabled():
        print(f"[811 x 5,000 problems of {sum(map(len, texts)) // len(texts)} characters: {seconds:.1f} s]", end="")
    assert len(rows) == 811
    assert rows[400].shape == (5_000,)
    assert seconds < 60
