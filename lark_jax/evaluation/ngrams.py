"""Exact Jaccard indices of character 8-grams, for every pair of two lists of texts.

8-grams become integers by ranking, not by hashing; shared ones are counted with an inverted index. Pure NumPy.
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np

GRAM = 8  # characters; a power of two, see `_ranks_of_grams`
_PADDING = 0x110000  # not a character code

# A LaTeX line break, "\\", is not part of the macro after it; group 1 keeps it.
_THIN_SPACES = re.compile(r"(\\\\)|\\(?:[,:;!>]|(?:neg)?(?:thin|med|thick)space(?![a-z]) ?)")
_WIDE_SPACES = re.compile(r"(\\\\)|\\(?: |(?:q?quad|enspace|enskip|space)(?![a-z])|[hv]space\*? *\{[^{}]*\})|(?<!\\)~")


def normalize_problem(text: str) -> str:
    """Lower case, LaTeX's spacing macros stripped, white space collapsed.

    Macros narrower than a word space are removed ("3\\,000" is "3000"), wider ones become a space.
    """
    text = _THIN_SPACES.sub(r"\1", text.lower())
    text = _WIDE_SPACES.sub(lambda match: match[1] or " ", text)
    return " ".join(text.split())


def jaccard_rows(queries: Sequence[str], corpus: Sequence[str]) -> Iterator[np.ndarray]:
    """For each query, the Jaccard indices of its 8-grams with those of every text of the corpus, float64 [corpus].

    A text of fewer than eight characters is a single gram.
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
    """The distinct (text, gram) pairs, sorted by text, as two int64 [pairs]; and the number of grams."""
    codes = [_codes(text) for text in texts]
    texts_s = np.repeat(np.arange(len(texts)), [len(code) for code in codes])  # s: symbols of all texts, concatenated
    ranks, num_grams = _ranks_of_grams(np.concatenate(codes))
    owners = texts_s[: len(ranks)]
    within = owners == texts_s[GRAM - 1 :]  # other windows span the end of one text and the start of the next
    pairs = np.unique(owners[within] * num_grams + ranks[within])
    return pairs // num_grams, pairs % num_grams, num_grams


def _codes(text: str) -> np.ndarray:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)
    return np.pad(codes, (0, max(0, GRAM - len(codes))), constant_values=_PADDING)


def _ranks_of_grams(symbols: np.ndarray) -> tuple[np.ndarray, int]:
    """A number for the GRAM symbols from each position on, equal for equal symbols; and how many numbers there are.

    By doubling: a window of 2n symbols is a pair of windows of n, and the pairs of their ranks are ranked again.
    """
    values, ranks = np.unique(symbols, return_inverse=True)
    width = 1
    while width < GRAM:
        values, ranks = np.unique(ranks[:-width] * len(values) + ranks[width:], return_inverse=True)
        width *= 2
    return ranks, len(values)


def _ranges(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """start, start + 1, ..., end - 1 of every pair, concatenated."""
    lengths = ends - starts
    offsets = np.repeat(starts - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
    return offsets + np.arange(lengths.sum())
