"""What a pool holds and which records a run would leave out, before an accelerator is paid for."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lark_jax.pool.records import DuplicateAnswer, Pool, SkippedRecord

LISTED = 20  # records by name in the text; all are in the JSON
QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


@dataclass(frozen=True)
class Lengths:
    """Lengths of many texts, in characters or tokens."""

    total: int
    mean: float
    quantiles: tuple[int, ...]  # at QUANTILES


@dataclass(frozen=True)
class Tokens:
    """The pool under a student's tokenizer and chat template."""

    student: str
    max_length: int
    prompts: Lengths
    targets: Lengths  # after the cut at max_length
    truncated: int
    refused: tuple[SkippedRecord, ...]


@dataclass(frozen=True)
class PoolSummary:
    problems: int
    trajectories: int
    candidates: dict[int, int]  # candidates per problem -> number of such problems
    teachers: dict[str, int]  # most trajectories first
    correct: int
    wrong: int
    prompt_characters: Lengths
    answer_characters: Lengths
    skipped: tuple[SkippedRecord, ...]
    filtered: tuple[SkippedRecord, ...]
    duplicates: tuple[DuplicateAnswer, ...]
    files_left_out: tuple[str, ...]
    tokens: Tokens | None = None


def summarise(pool: Pool, advance: Callable[[int], object] = lambda _: None) -> PoolSummary:
    """Reads every text once; `advance` is called per trajectory."""
    problems: Counter[str] = Counter()
    teachers: Counter[str] = Counter()
    verdicts: Counter[bool | None] = Counter()
    prompts, answers = [], []
    for trajectory in pool.trajectories:
        problems[trajectory.problem_id] += 1
        teachers[trajectory.teacher] += 1
        verdicts[trajectory.correct] += 1
        prompts.append(sum(len(message.content) for message in trajectory.prompt))
        answers.append(len(trajectory.response))
        advance(1)
    return PoolSummary(
        problems=len(problems),
        trajectories=len(pool.trajectories),
        candidates=dict(sorted(Counter(problems.values()).items())),
        teachers=dict(sorted(teachers.items(), key=lambda item: (-item[1], item[0]))),
        correct=verdicts[True],
        wrong=verdicts[False],
        prompt_characters=lengths_of(prompts),
        answer_characters=lengths_of(answers),
        skipped=pool.skipped,
        filtered=pool.filtered,
        duplicates=pool.duplicates,
        files_left_out=pool.files_left_out,
    )


def as_text(summary: PoolSummary) -> str:
    """For a terminal; long lists are cut."""
    unknown = summary.trajectories - summary.correct - summary.wrong
    judged = f"{summary.correct:,} correct, {summary.wrong:,} wrong, {unknown:,} not judged"
    lines = [
        f"{summary.problems:,} problems, {summary.trajectories:,} trajectories: {judged}",
        "",
        *_table("candidates", [(str(count), many) for count, many in summary.candidates.items()], "problems"),
        "",
        *_table("teacher", list(summary.teachers.items()), "trajectories"),
        "",
        f"{'lengths':<20}" + "".join(f"{name:>12}" for name in ("shortest", "10%", "median", "90%", "longest", "mean")),
        _length_row("prompt, characters", summary.prompt_characters),
        _length_row("answer, characters", summary.answer_characters),
    ]
    tokens = summary.tokens
    if tokens is not None:
        lines += [_length_row("prompt, tokens", tokens.prompts), _length_row("target, tokens", tokens.targets)]
        total = tokens.prompts.total + tokens.targets.total
        cut = f"{tokens.truncated:,} trajectories are cut at student.max_length={tokens.max_length:,}"
        lines += [f"{total:,} tokens under the tokenizer of {tokens.student}; {cut}"]
    lines += _records("bad records", summary.skipped)
    lines += _by_reason("left out by the configuration", summary.filtered)
    lines += _records("cannot be scored by this student", () if tokens is None else tokens.refused)
    repeated = [f"{item.location}: repeats {item.earlier}" for item in summary.duplicates]
    lines += _listed("answers that repeat another one to their problem word for word", repeated)
    lines += _listed("files that are not part of the pool", summary.files_left_out)
    return "\n".join(lines)


def lengths_of(values: Sequence[int]) -> Lengths:
    """Total, mean and quantiles; zeros without values."""
    if not values:
        return Lengths(0, 0.0, (0,) * len(QUANTILES))
    quantiles = np.quantile(values, QUANTILES, method="nearest")
    return Lengths(sum(values), sum(values) / len(values), tuple(int(value) for value in quantiles))


def _length_row(name: str, lengths: Lengths) -> str:
    return f"{name:<20}" + "".join(f"{value:>12,}" for value in (*lengths.quantiles, round(lengths.mean)))


def _table(head: str, rows: Sequence[tuple[str, int]], unit: str) -> list[str]:
    width = max(len(head), *(len(name) for name, _ in rows))
    longest = max(count for _, count in rows)
    bars = [f"{name:<{width}}  {count:>12,}  {'#' * max(1, round(30 * count / longest))}" for name, count in rows]
    return [f"{head:<{width}}  {unit:>12}", *bars]


def _records(head: str, records: Sequence[SkippedRecord]) -> list[str]:
    names = ["/".join(filter(None, (record.problem_id, record.candidate_id))) for record in records]
    lines = [
        ": ".join(filter(None, (record.location, name, record.reason)))
        for record, name in zip(records, names, strict=True)
    ]
    return _listed(head, lines)


def _by_reason(head: str, records: Sequence[SkippedRecord]) -> list[str]:
    """How often each reason occurs, and where first; reasons that differ only in a location are one."""
    first: dict[str, SkippedRecord] = {}
    counts = Counter(record.reason.partition(" that of ")[0] for record in records)
    for record in records:
        first.setdefault(record.reason.partition(" that of ")[0], record)
    lines = [f"  {count:,} x {reason} (first: {first[reason].location})" for reason, count in counts.items()]
    return ["", f"{len(records):,} {head}:", *lines] if records else []


def _listed(head: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    more = [f"  and {len(lines) - LISTED:,} more; --out=FILE.json lists them all"] if len(lines) > LISTED else []
    return ["", f"{len(lines):,} {head}:", *(f"  {line}" for line in lines[:LISTED]), *more]
