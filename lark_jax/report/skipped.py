"""What a stage left out, as the page shows it: a bounded list, and how often each kind of reason came."""

from collections import Counter
from dataclasses import dataclass

from lark_jax.report.content import StageSummary
from lark_jax.report.table import Table

RECORDS_SHOWN = 1_000  # of a stage; its manifest has all
KINDS_SHOWN = 20


@dataclass(frozen=True)
class SkippedSection:
    reasons: Table
    records: Table
    caption: str  # of the records


def skipped_section(stage: StageSummary) -> SkippedSection:
    """The first records in the manifest's order; kinds of reasons, most frequent first, are of all records."""
    shown = stage.skipped[:RECORDS_SHOWN]
    rows = tuple((record.problem_id, record.candidate_id, record.location, record.reason) for record in shown)
    return SkippedSection(
        reasons=_reasons(stage),
        records=Table(("problem", "candidate", "where", "reason"), rows, (False,) * 4),
        caption=_caption(stage),
    )


def _reasons(stage: StageSummary) -> Table:
    """By what stands before a reason's colon: its name, or what it is about."""
    counts = Counter(record.reason.partition(":")[0] for record in stage.skipped).most_common()
    rows = [(kind, f"{count:,}") for kind, count in counts[:KINDS_SHOWN]]
    others = counts[KINDS_SHOWN:]
    if others:
        rows.append((f"{len(others):,} other reasons", f"{sum(count for _, count in others):,}"))
    return Table(("reason", "records"), tuple(rows), (False, True))


def _caption(stage: StageSummary) -> str:
    if len(stage.skipped) <= RECORDS_SHOWN:
        return f"Every record that {stage.stage} left out."
    return (
        f"The first {RECORDS_SHOWN:,} of {len(stage.skipped):,} records that {stage.stage} left out; all are in "
        f"{stage.manifest}."
    )
