"""Rule-based quality: four indicators of a trajectory's text (paper, Appendix C.2, after LIMO, arXiv 2502.03387).

Where the paper leaves a choice: words are separated by white space; a keyword counts as a whole word in any case,
without inflected forms ("checking"); the text is the whole content of the assistant's message, including the thinking
and what a student's `max_length` would cut off. An empty text has frequencies of 0.
"""

import re
from collections.abc import Iterable

import numpy as np

KEYWORDS: dict[str, tuple[str, ...]] = {
    "rule_verification": ("check", "verify"),
    "rule_exploration": ("perhaps", "might"),
    "rule_granularity": ("therefore", "since"),
}
COLUMNS = ("rule_words", *KEYWORDS)

_PATTERNS = {name: re.compile(rf"\b(?:{'|'.join(words)})\b", re.IGNORECASE) for name, words in KEYWORDS.items()}


def text_indicators(text: str) -> dict[str, float]:
    """Number of words, and occurrences of each group of keywords per word, by column name."""
    words = len(text.split())
    frequencies = {name: len(pattern.findall(text)) / max(words, 1) for name, pattern in _PATTERNS.items()}
    return {"rule_words": float(words), **frequencies}


def indicator_columns(texts: Iterable[str]) -> dict[str, np.ndarray]:
    """`text_indicators` of all texts: column name -> float64 [texts]."""
    rows = [text_indicators(text) for text in texts]
    return {name: np.array([row[name] for row in rows], np.float64) for name in COLUMNS}
