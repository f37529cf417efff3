"""Entry point: `python -m lark_jax.audit --pool=POOL --benchmarks=FILE,FILE --out=FOLDER`.

Compares every problem of the benchmarks with every problem of the pool (`evaluation.contamination`) and writes

    contamination.md, .csv, .tex   the paper's Table 2
    index.html                     the table, and the nearest pairs side by side
    nearest.jsonl                  each evaluation problem, its nearest pool problem, and their Jaccard index
    audit.json                     what was compared: counts and fingerprints
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from lark_jax.config import expand_home, split_commas
from lark_jax.errors import ConfigError
from lark_jax.evaluation.benchmark_records import Benchmark
from lark_jax.evaluation.benchmarks import read_benchmark, require_distinct
from lark_jax.evaluation.contamination import Audit, audit_benchmarks, pool_problems
from lark_jax.pool import read_pool
from lark_jax.report.contamination import contamination_section, contamination_table
from lark_jax.report.page import render_template
from lark_jax.report.table import csv_table, latex_table, markdown_table, text_table
from lark_jax.runtime import files
from lark_jax.runtime.command import Arguments, Command, Flag


def audit(arguments: Arguments) -> int:
    """Audits, writes and prints the table."""
    pool = arguments.flags["pool"]
    entries = split_commas(arguments.flags["benchmarks"])
    if not entries:
        raise ConfigError(f"--benchmarks={arguments.flags['benchmarks']}: names no benchmark")
    benchmarks = [read_benchmark(expand_home(entry)) for entry in entries]
    require_distinct([benchmark.name for benchmark in benchmarks])
    problems = pool_problems(read_pool(pool, arguments.flags["on_bad_record"]).by_problem())
    start = time.perf_counter()
    found = audit_benchmarks(benchmarks, problems)
    seconds = time.perf_counter() - start
    page = write_audit(found, pool, benchmarks, problems, Path(arguments.flags["out"]))
    print(text_table(contamination_table(found)))
    print(f"\n{len(found.overlaps):,} x {len(problems):,} problems compared in {seconds:.1f} s. Pairs: {page}")
    return 0


def write_audit(
    audit: Audit, pool: str, benchmarks: Sequence[Benchmark], problems: dict[str, str], folder: Path
) -> Path:
    """Writes the files that the module's docstring names, the page last; returns the page's path."""
    table = contamination_table(audit)
    files.write_text(folder / "contamination.md", markdown_table(table) + "\n")
    files.write_text(folder / "contamination.csv", csv_table(table))
    files.write_text(folder / "contamination.tex", latex_table(table, rule_before_last=True))
    files.write_jsonl(folder / "nearest.jsonl", [dataclasses.asdict(overlap) for overlap in audit.overlaps])
    described = {
        "pool": {"path": pool, "problems": len(problems), "fingerprint": files.sha256_of_json(problems)},
        "benchmarks": {benchmark.name: benchmark.fingerprint for benchmark in benchmarks},
        "left_out": dataclasses.asdict(audit.frame),
    }
    files.write_json(folder / "audit.json", described)
    page = folder / "index.html"
    files.write_text(page, render_template("audit_page.html.j2", pool=pool, contamination=contamination_section(audit)))
    return page


COMMAND = Command(
    name="lark_jax.audit",
    usage="--pool=POOL --benchmarks=FILE,FILE --out=FOLDER [--on_bad_record=skip]",
    doc="Compares every problem of the benchmarks with every problem of the pool: the paper's Table 2.",
    action=audit,
    flags=(
        Flag("pool", "Candidate pool, as in config.pool.path.", required=True, path=True),
        Flag("benchmarks", "As in config.evaluate.benchmarks, separated by commas.", required=True),
        Flag("out", "Folder for table, page and pairs.", required=True, path=True),
        Flag("on_bad_record", "What to do with a bad record of the pool.", "error", choices=("error", "skip")),
    ),
)
main = COMMAND.main

if __name__ == "__main__":
    COMMAND.start()
