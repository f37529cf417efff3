"""From an answer to its sentence-level steps, and from steps to their tokens.

The rule is one regular expression, searched from left to right. Where its group `end` matches, a step ends after the
match; any other match is text that is never cut. The default, `SENTENCES`:

- A step ends after ., ! or ? (or their full-width forms), closing quotes, brackets and asterisks included, if white
  space follows, and at every line break. The white space belongs to the step, except the indentation of the next line.
  So "3.14" and "f.g" stay whole. Math that ends with the sentence, "$x = 5.$" or "\\(x = 5.\\)", is closed like a
  quote, but not after "!": "$5!$" is a factorial.
- Fenced code, display math in \\[ \\] or $$ $$, common abbreviations ("e.g.", "Fig.", "Dr.") and the number of a list
  item ("2. Next") are never cut.

A piece without a letter or digit (a rule, a lone bracket) joins the step before it, or the one after it if it is first.

Tokens are those of the whole answer, as everywhere else: nothing is tokenized twice. A token belongs to the step of its
last character, since tokens begin with the space before a word.
"""

import re
from collections.abc import Sequence

import numpy as np

SENTENCES = r"""(?x)
    ```.*?(?:```|\Z)                                     # fenced code
  | (?<!\\)\\\[.*?\\\]                                   # display math; "\\[4pt]" breaks a row
  | \$\$.*?\$\$
  | (?<![^\W_])(?:[Ee]\.g|[Ii]\.e|cf|vs|approx|resp|[Ff]igs?|[Ee]qs?|Sec|Thm|Dr|Mrs?|Ms|Prof)\.
  | (?<![^\W_])[Nn]o\.(?=\ \d)                           # "no. 5"
  | ^[ \t]*(?:\#+[ \t]*)?\d+\.(?=[ \t])                  # "2." before the item of a list
  | (?P<end> (?: [.?]+(?:["'”’)\]*_]|\$(?!\$)|\\[)\]])*  # math may end with the sentence; "5!$" is a factorial
               | [.!?]+["'”’)\]*_]* )(?:\s*\n|\s+|\Z)
           | [。！？]+[”’）」]*(?:\s*\n|\s*) | \s*\n )
"""
_SOMETHING_SAID = re.compile(r"[^\W_]")


def compile_split(rule: str | None) -> re.Pattern[str]:
    """The rule as a pattern; None: `SENTENCES`. `.` matches line breaks; `^` and `$` match at every line.

    Raises:
      ValueError: it is not a regular expression, or has no group `end`.
    """
    try:
        pattern = re.compile(SENTENCES if rule is None else rule, re.DOTALL | re.MULTILINE)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    if "end" not in pattern.groupindex:
        raise ValueError("no group named `end`, which marks where a step ends: (?P<end>...)")
    return pattern


def step_starts(text: str, split: re.Pattern[str]) -> tuple[int, ...]:
    """Index of the first character of each step of `text`; the first is 0. A text has at least one step."""
    ends = [match.end() for match in split.finditer(text) if match.group("end") is not None]
    starts = [0]
    for end in [*(end for end in ends if 0 < end < len(text)), len(text)]:
        if _SOMETHING_SAID.search(text, starts[-1], end):
            starts.append(end)
        elif len(starts) > 1:
            starts[-1] = end  # the piece joins the step before it
    return tuple(starts[:-1]) or (0,)


def steps_of_tokens(offsets: Sequence[tuple[int, int]], starts: Sequence[int]) -> np.ndarray:
    """int32 [tokens]: the step of each token, ascending from 0 without gaps.

    Args:
      offsets: index of each token's first character, and one past its last, in the text of `starts`. Tokens before the
        text (negative) go to the first step, tokens after it to the last. Some tokenizers trim white space: a token
        of nothing else is then empty, (end, end), and its last character is the one before.
      starts: from `step_starts`. A step without the last character of any token vanishes.
    """
    last_characters = np.asarray([end - 1 for _, end in offsets], np.int64)
    steps = np.searchsorted(np.asarray(starts), last_characters, side="right") - 1
    steps = np.maximum.accumulate(np.maximum(steps, 0))
    return np.unique(steps, return_inverse=True)[1].astype(np.int32)
