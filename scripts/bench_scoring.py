"""Scoring speed and memory: ours against the published method, the same rows, one run, one device.

    python scripts/bench_scoring.py --shape=qwen2.5-0.5b --lengths=512,2048,4096 --dtype=bfloat16 --out=F.json
    python scripts/bench_scoring.py --student=FOLDER --pool=POOL.jsonl [--records=200] --out=F.json

With --shape, a student of that size gets random weights and scores rows of random tokens; with --pool, real records
are rendered and scored (evenly spaced ones, in our length buckets). The contestants (`scoring_contestants.py`):

  ours                             all statistics, exact, in batches of --tokens_per_batch
  ours, cross-entropy only         shows what the other statistics cost
  published                        transformers on torch, sdpa, one row at a time, full float32 logits, top-50 Brier
  published, exact Brier and RSR   the same, exact, with clipped ranks

Each runs in a process of its own, in turn, --rounds times; ratios are medians of the ratios within a round. Tokens are
real tokens: prompt and answer, no padding. MFU is the model's analytic FLOPs per second over the device's own matmul
rate in the same dtype, measured in the same run.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from measuring import matmul_rate, random_checkpoint, run_contestant, versions
from scoring_contestants import CONTESTANTS, Request, Result
from shapes import SHAPES

from lark_jax.pool import read_pool
from lark_jax.rendering.batching import assemble, plan_batches
from lark_jax.rendering.chat import RenderedTrajectory, load_chat_format, render_trajectories
from lark_jax.runtime import environment, files
from lark_jax.students import read_architecture
from lark_jax.students.flops import forward_flops

CHECKPOINT_DTYPE = "bfloat16"  # of published checkpoints, independent of --dtype
PROMPT_SHARE = 8  # random rows: one token in eight is prompt


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        student = Path(options.student or random_checkpoint(options.shape, CHECKPOINT_DTYPE, Path(scratch)))
        cases = pool_case(student, options) if options.pool else random_cases(student, options)
        rate = matmul_rate(options.dtype)
        print(f"{environment.hardware()}; {options.dtype} matmul {rate / 1e12:.2f} TFLOP/s; {json.dumps(versions())}")
        reports = [run_case(name, arrays, student, Path(scratch), rate, options) for name, arrays in cases]
    if options.out:
        document = {
            "hardware": environment.hardware(),
            "versions": environment.package_versions(),
            "options": vars(options),
            "matmul_flops_per_second": rate,
            "cases": reports,
        }
        files.write_json(options.out, document)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--shape", choices=sorted(SHAPES), help="random weights in this shape")
    source.add_argument("--student", help="checkpoint folder; see scripts/make_random_student.py")
    parser.add_argument("--pool", help=".jsonl or .parquet; needs --student")
    parser.add_argument("--chat_template", help="Jinja file, for tokenizers without a template")
    parser.add_argument("--records", type=int, default=200, help="of the pool, evenly spaced")
    parser.add_argument("--max_length", type=int, default=2_048, help="of the pool's records, in tokens")
    parser.add_argument("--lengths", default="512,2048,4096", help="tokens of a random row")
    parser.add_argument("--tokens", type=int, default=8_192, help="of each length, at least one row")
    parser.add_argument("--tokens_per_batch", type=int, default=8_192, help="of ours, padding included")
    parser.add_argument("--vocab_chunk", type=int, default=4_096)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3, help="of all contestants, in turns; medians are reported")
    parser.add_argument("--scratch", help="folder for the random checkpoint; default: the system's")
    parser.add_argument("--out", help="JSON file for the figures")
    options = parser.parse_args()
    if options.pool and not options.student:
        parser.error("--pool needs --student, whose tokenizer renders it")
    return options


def random_cases(student: Path, options: argparse.Namespace) -> list[tuple[str, dict[str, np.ndarray]]]:
    generator = np.random.default_rng(0)
    vocab_size = read_architecture(student).vocab_size
    cases = []
    for length in map(int, options.lengths.split(",")):
        rows = max(1, options.tokens // length)
        sequence = generator.integers(0, vocab_size, (rows, length + 1), dtype=np.int32)
        mask = np.broadcast_to(np.arange(length) >= length // PROMPT_SHARE, (rows, length)).astype(np.float32)
        arrays = {"tokens": sequence[:, :-1], "targets": sequence[:, 1:], "mask": mask}
        cases.append((f"{rows} x {length} tokens", arrays))
    return cases


def pool_case(student: Path, options: argparse.Namespace) -> list[tuple[str, dict[str, np.ndarray]]]:
    """One case for every length bucket of the sampled records."""
    chat = load_chat_format(student, options.chat_template)
    pool = read_pool(options.pool)
    every = max(1, len(pool.trajectories) // options.records)
    rendered = list(render_trajectories(chat, pool.trajectories[::every][: options.records], options.max_length))
    scorable = [item for item in rendered if isinstance(item, RenderedTrajectory)]
    by_length: dict[int, list] = {}
    for plan in plan_batches([item.num_inputs for item in scorable], options.tokens_per_batch, 1):
        by_length.setdefault(plan.length, []).append(assemble(scorable, plan, chat.pad_id))
    cases = []
    for length, batches in by_length.items():
        real = np.concatenate([batch.row_ids_b >= 0 for batch in batches])
        columns = {"tokens": "tokens_bt", "targets": "targets_bt", "mask": "mask_bt"}
        arrays = {k: np.concatenate([getattr(b, v) for b in batches])[real] for k, v in columns.items()}
        cases.append((f"{real.sum()} records of up to {length} tokens", arrays))
    return cases


def run_case(
    name: str, arrays: dict[str, np.ndarray], student: Path, scratch: Path, rate: float, options: argparse.Namespace
) -> dict:
    np.savez(scratch / "rows.npz", **arrays)
    length = arrays["tokens"].shape[1]
    lengths = [int(row.nonzero()[0][-1]) + 1 for row in arrays["mask"]]
    flops = sum(forward_flops(read_architecture(student), n) for n in lengths)
    request = Request(
        contestant="",
        student=str(student),
        rows=str(scratch / "rows.npz"),
        dtype=options.dtype,
        vocab_chunk=options.vocab_chunk,
        rows_per_batch=max(1, options.tokens_per_batch // length),
    )
    script = Path(__file__).with_name("scoring_contestants.py")
    # In turns, so that a drift of the machine's speed affects all of them.
    rounds = [
        [Result(**run_contestant(script, asdict(replace(request, contestant=name)), scratch)) for name in CONTESTANTS]
        for _ in range(options.rounds)
    ]
    results = [merged(of_one) for of_one in zip(*rounds, strict=True)]
    print_case(name, results, sum(lengths), flops, rate)
    rows = [
        {
            **asdict(r),
            "tokens_per_second": sum(lengths) / r.seconds,
            "mfu": flops / r.seconds / rate,
            "seconds_over_ours": median_ratio(r, results[0]),
        }
        for r in results
    ]
    return {"case": name, "tokens": sum(lengths), "flops": flops, "results": rows}


def merged(rounds: Sequence[Result]) -> Result:
    """The rounds of one contestant: the median of the times, the largest memory."""
    return replace(
        rounds[0],
        seconds=float(np.median([one.seconds for one in rounds])),
        all_seconds=tuple(seconds for one in rounds for seconds in one.all_seconds),
        peak_bytes=max(one.peak_bytes for one in rounds),
        resident_bytes=max(one.resident_bytes for one in rounds),
        setup_seconds=float(np.median([one.setup_seconds for one in rounds])),
    )


def median_ratio(result: Result, ours: Result) -> float:
    """The median of the ratios of the times within a round."""
    return float(np.median(np.divide(result.all_seconds, ours.all_seconds)))


def print_case(name: str, results: Sequence[Result], tokens: int, flops: float, rate: float) -> None:
    ours = results[0]
    print(f"\n{name}")
    header = (
        "tokens/s",
        "ours / it",
        "MFU",
        "peak GiB",
        "its / ours",
        "above parameters",
        "max |dloss|",
        "max |dBrier|",
    )
    print(f"{'':<32}" + "".join(f"{column:>18}" for column in header))
    for r in results:
        above = (r.peak_bytes - r.resident_bytes) / 2**30
        loss, brier = (
            np.abs(np.array(a) - np.array(b)).max() for a, b in ((r.losses, ours.losses), (r.briers, ours.briers))
        )
        values = (
            f"{tokens / r.seconds:,.0f}",
            f"{median_ratio(r, ours):.2f}",
            f"{flops / r.seconds / rate:.1%}",
            f"{r.peak_bytes / 2**30:.2f}",
            f"{r.peak_bytes / ours.peak_bytes:.2f}",
            f"{above:.2f} GiB",
            f"{loss:.1e}",
            "" if np.isnan(brier) else f"{brier:.1e}",
        )
        print(f"{r.contestant:<32}" + "".join(f"{value:>18}" for value in values))


if __name__ == "__main__":
    main()
