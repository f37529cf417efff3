"""Seconds and peak memory of reading a pool of the published size: 5,000 problems x 33 lists, several gigabytes.

    python scripts/bench_pool.py --folder=/scratch/pool --out=build/bench_pool.json

The pool is written into the folder, unless it exists, in the layout of the RSR paper's data: a folder per teacher and a
JSON list per rollout. It is read in a separate process, whose peak memory the operating system reports; then every text
is read again in the order of its length, as in scoring.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

TEACHERS, ROLLOUTS = 11, 3
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}"
TEXT = (
    "let x = \\frac{1}{2} so that the sum of all terms is 3 \n\n wait, check: ∑ aₙ ≤ π² “hence” therefore \\boxed{42} é"
)
WORDS = TEXT.split(" ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--problems", type=int, default=5_000)
    parser.add_argument("--characters", type=int, default=20_000, help="mean length of an answer")
    parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)  # in the process that is measured
    options = parser.parse_args()
    if options.read:
        print(json.dumps(measure(options.folder)))
        return
    write_pool(options.folder, options.problems, options.characters)
    command = [sys.executable, __file__, "--read", f"--folder={options.folder}"]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(answer, end="")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(json.loads(answer), indent=2) + "\n", encoding="utf-8")


def write_pool(folder: Path, problems: int, characters: int) -> None:
    """`TEACHERS` x `ROLLOUTS` lists; existing ones are kept."""
    rng = random.Random(0)
    words = " ".join(rng.choice(WORDS) for _ in range(400_000))
    for teacher in range(TEACHERS):
        for rollout in range(ROLLOUTS):
            path = folder / f"teacher-{teacher}" / f"gen{rollout + 1}.json"
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            with partial.open("w", encoding="utf-8") as stream:
                for problem in range(problems):
                    length = min(len(words), int(rng.lognormvariate(0, 0.7) * characters / 1.28))
                    start = rng.randrange(max(1, len(words) - length))
                    record = {"messages": turns(problem, f"<think>{words[start : start + length]}</think>")}
                    stream.write(("[" if problem == 0 else ",\n") + json.dumps(record, ensure_ascii=False))
                stream.write("]")
            partial.rename(path)


def turns(problem: int, answer: str) -> list[dict[str, str]]:
    question = f"Problem {problem}: " + " ".join(WORDS[(problem + i) % len(WORDS)] for i in range(60))
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


def measure(folder: Path) -> dict[str, float]:
    from lark_jax.pool import read_pool

    before = peak()
    start, start_cpu = time.perf_counter(), time.process_time()
    pool = read_pool(folder)
    read, read_cpu = time.perf_counter(), time.process_time()
    peak_of_reading = peak()
    characters = [len(trajectory.response) for trajectory in pool.trajectories]
    once = time.perf_counter()
    for index in sorted(range(len(characters)), key=characters.__getitem__):
        assert len(pool.trajectories[index].response) == characters[index]
    return {
        "records": len(pool.trajectories),
        "gigabytes": round(sum(path.stat().st_size for path in folder.rglob("*.json")) / 1e9, 3),
        "characters": sum(characters),
        "seconds_to_read": round(read - start, 1),
        "processor_seconds_to_read": round(read_cpu - start_cpu, 1),
        "seconds_for_all_texts_in_order": round(once - read, 1),
        "seconds_for_all_texts_by_length": round(time.perf_counter() - once, 1),
        "peak_gib_before": round(before, 3),
        "peak_gib_of_reading": round(peak_of_reading, 3),
        "peak_gib": round(peak(), 3),
    }


def peak() -> float:
    """Peak memory of this process, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


if __name__ == "__main__":
    main()
