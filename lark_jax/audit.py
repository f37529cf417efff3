"""Entry point: `python -m lark_jax.audit --pool=POOL --benchmarks=FILE,FILE --out=FOLDER`.

Compares every problem of the benchmarks with every problem of the pool (`evaluation.contamination`) and writes

    contamination.md, .csv, .tex   the paper's Table 2
    index.html                     the table, and the nearest pairs side by side
    nearest.jsonl                  each evaluation problem, its nearest pool problem, and their Jaccard index
    audit.json                     what was compared: counts and fingerprints
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lark_jax.errors import LarkError
from lark_jax.evaluation.benchmark_records import Benchmark
from lark_jax.evaluation.benchmarks import read_benchmark
from lark_jax.evaluation.contamination import Audit, audit_benchmarks, pool_problems
from lark_jax.pool import read_pool
from lark_jax.report.contamination import contamination_section, contamination_table
from lark_jax.report.page import render_template
from lark_jax.report.table import csv_table, latex_table, markdown_table, text_table
from lark_jax.runtime import files

EXIT_USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Audits and writes; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        benchmarks = [read_benchmark(path) for path in options.benchmarks.split(",")]
        problems = pool_problems(read_pool(options.pool, options.on_bad_record).by_problem())
        start = time.perf_counter()
        audit = audit_benchmarks(benchmarks, problems)
        seconds = time.perf_counter() - start
        page = write_audit(audit, options.pool, benchmarks, problems, Path(options.out))
    except (LarkError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(text_table(contamination_table(audit)))
    print(f"\n{len(audit.overlaps):,} x {len(problems):,} problems compared in {seconds:.1f} s. Pairs: {page}")
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lark_jax.audit", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--pool", required=True, help="candidate pool, as in config.pool.path")
    parser.add_argument("--benchmarks", required=True, help="as in config.evaluate.benchmarks, separated by commas")
    parser.add_argument("--out", required=True, help="folder for table, page and pairs")
    parser.add_argument("--on_bad_record", default="error", choices=("error", "skip"), help="of the pool")
    return parser


if __name__ == "__main__":
    sys.exit(main())
