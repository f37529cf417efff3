"""Jaccard indices of the character 8-grams of many texts with those of many others: every pair, and exact.

8-grams become integers by ranking, not by hashing, and shared ones are counted along an inverted index. Pure NumPy.
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np

GRAM = 8  # characters; a power of two, see `_ranks_of_grams`
_PADDING = 0x110000  # no character has this code

# A line break of LaTeX, "\\", is no part of the macro behind it; group 1 keeps it.
_THIN_SPACES = re.compile(r"(\\\\)|\\(?:[,:;!>]|(?:neg)?(?:thin|med|thick)space(?![a-z]) ?)")
_WIDE_SPACES = re.compile(r"(\\\\)|\\(?: |(?:q?quad|enspace|enskip|space)(?![a-z])|[hv]space\*? *\{[^{}]*\})|(?<!\\)~")


def normalize_problem(text: str) -> str:
    """Lower case, LaTeX's spacing macros stripped, white space collapsed.

    Macros for less than a word space vanish ("3\\,000" is "3000"), wider ones become a space.
    """
    text = _THIN_SPACES.sub(r"\1", text.lower())
    text = _WIDE_SPACES.sub(lambda match: match[1] or " ", text)
    return " ".join(text.split())


def jaccard_rows(queries: Sequence[str], corpus: Sequence[str]) -> Iterator[np.ndarray]:
    """For each query, the Jaccard indices of its 8-grams with those of every text of the corpus, float64 [corpus].

    A text of fewer than eight characters is its own only gram.
    """
    texts_g, grams_g, num_grams = _distinct_grams([*corpus, *queries])
    sizes_t = np.bincount(texts_g, minlength=len(corpus) + len(queries))
    first_query_gram = int(sizes_t[: len(corpus)].sum())
    by_gram = np.argsort(grams_g[:first_query_gram], kind="stable")
    postings_g = texts_g[by_gram]  # texts of the corpus, by gram
    ends = np.cumsum(np.bincount(grams_g[:first_query_gram], minlength=num_grams))
    starts = np.concatenate([[0], ends[:-1]])
    query_ends = first_query_gram + np.cumsum(sizes_t[len(corpus) :])
    for query, end in enumerate(query_ends):
        size = sizes_t[len(corpus) + query]
        grams = grams_g[end - size : end]
        shared_c = np.bincount(postings_g[_ranges(starts[grams], ends[grams])], minlength=len(corpus))
        yield shared_c / (size + sizes_t[: len(corpus)] - shared_c)


def _distinct_grams(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, int]:
    """Every pair of a text and a gram in it, once, by text: their numbers, int64 [pairs] each; how many grams exist."""
    codes = [_codes(text) for text in texts]
    texts_s = np.repeat(np.arange(len(texts)), [len(code) for code in codes])  # s: symbols, one after the other
    ranks, num_grams = _ranks_of_grams(np.concatenate(codes))
    owners = texts_s[: len(ranks)]
    within = owners == texts_s[GRAM - 1 :]  # the other windows hold the end of one text and the start of the next
    pairs = np.unique(owners[within] * num_grams + ranks[within])
    return pairs // num_grams, pairs % num_grams, num_grams


def _codes(text: str) -> np.ndarray:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)
    return np.pad(codes, (0, max(0, GRAM - len(codes))), constant_values=_PADDING)


def _ranks_of_grams(symbols: np.ndarray) -> tuple[np.ndarray, int]:
    """A number for the GRAM symbols from each position on, the same for the same symbols; and how many there are.

    By doubling: a window of 2n symbols is a pair of windows of n, and pairs of ranks are ranked again.
    """
    values, ranks = np.unique(symbols, return_inverse=True)
    width = 1
    while width < GRAM:
        values, ranks = np.unique(ranks[:-width] * len(values) + ranks[width:], return_inverse=True)
        width *= 2
    return ranks, len(values)


def _ranges(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """start, start + 1, ..., end - 1 of every pair, one after the other."""
    lengths = ends - starts
    offsets = np.repeat(starts - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
    return offsets + np.arange(lengths.sum())
