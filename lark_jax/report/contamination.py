"""A contamination audit as the paper's Table 2, and its nearest pairs side by side."""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lark_jax.evaluation.contamination import THRESHOLDS, Audit, AuditRow, Overlap
from lark_jax.report.table import Table

PAIRS_SHOWN = 100  # near matches on the page, the most similar first
NEAREST_SHOWN = 3  # per group, even if none is near
CHARACTERS_SHOWN = 6_000  # of a problem


@dataclass(frozen=True)
class Segment:
    text: str
    differs: bool  # from the other problem of the pair


@dataclass(frozen=True)
class Pair:
    """An evaluation problem and its nearest pool problem, split into shared and differing segments."""

    overlap: Overlap
    problem: tuple[Segment, ...]
    pool_problem: tuple[Segment, ...]


@dataclass(frozen=True)
class ContaminationSection:
    """The content of the template contamination.html.j2."""

    table: Table
    pairs: tuple[Pair, ...]
    num_pool_problems: int
    left_out: tuple[str, ...]  # texts that all problems of the pool share
    pairs_shown: int = PAIRS_SHOWN


def contamination_section(audit: Audit) -> ContaminationSection:
    left_out = tuple(part.strip() for part in (audit.frame.before, audit.frame.after) if part)
    return ContaminationSection(contamination_table(audit), nearest_pairs(audit), audit.num_pool_problems, left_out)


def contamination_table(audit: Audit) -> Table:
    """Table 2 of the paper: problems with an exact match, and with one at or above each threshold."""
    header = ("Benchmark", "N", "Exact", *(f"J ≥ {threshold:g}" for threshold in THRESHOLDS))
    rows = tuple(_row(row) for row in (*audit.rows, audit.total))
    return Table(header, rows, (False,) + (True,) * (len(header) - 1))


def nearest_pairs(audit: Audit) -> tuple[Pair, ...]:
    """The pairs to look at: near matches up to `PAIRS_SHOWN` and the nearest of each group; most similar first."""
    ordered = sorted(audit.overlaps, key=lambda overlap: -overlap.jaccard)
    near = [overlap for overlap in ordered if overlap.num_near][:PAIRS_SHOWN]
    of_groups = [
        overlap
        for row in audit.rows
        for overlap in [overlap for overlap in ordered if overlap.group == row.group][:NEAREST_SHOWN]
    ]
    shown = dict.fromkeys([*near, *of_groups])
    return tuple(_pair(overlap) for overlap in sorted(shown, key=lambda overlap: -overlap.jaccard))


def _row(row: AuditRow) -> tuple[str, ...]:
    return (row.group, *(f"{count:,}" for count in (row.num_problems, row.exact, *row.near)))


def _pair(overlap: Overlap) -> Pair:
    """Compares words; a very long problem is cut, with a note."""
    words = [re.findall(r"\s*\S+", _cut(text)) for text in (overlap.problem, overlap.pool_problem)]
    blocks = difflib.SequenceMatcher(a=words[0], b=words[1], autojunk=False).get_matching_blocks()
    first = tuple(_segments(words[0], [(block.a, block.size) for block in blocks]))
    second = tuple(_segments(words[1], [(block.b, block.size) for block in blocks]))
    return Pair(overlap, first, second)


def _segments(words: Sequence[str], shared: Sequence[tuple[int, int]]) -> Iterator[Segment]:
    """`shared`: (start, size) of the runs of words in both problems, in order; the last one is empty, at the end."""
    position = 0
    for start, size in shared:
        for run, differs in ((words[position:start], True), (words[start : start + size], False)):
            if run:
                yield Segment("".join(run), differs)
        position = start + size


def _cut(text: str) -> str:
    left_out = len(text) - CHARACTERS_SHOWN
    return text if left_out <= 0 else f"{text[:CHARACTERS_SHOWN]} [{left_out:,} more characters]"
