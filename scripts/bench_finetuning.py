"""Fine-tuning speed and memory on one device: ours and the Hugging Face Trainer with the same weighted loss and rows.

    python scripts/bench_finetuning.py --shape=qwen2.5-0.5b --longest=2048 --shortest=256 --out=F.json
    python scripts/bench_finetuning.py --student=FOLDER --trajectories=16 --longest=512 --shortest=512 --out=F.json

With --shape, a student of that size gets random weights. Trajectories consist of random tokens and have random weights;
their lengths are spread evenly on a logarithmic scale from --shortest to --longest. Every step uses all of them. The
contestants (`finetuning_contestants.py`):

  ours                one trajectory per row, micro-batches of up to --tokens_per_batch
  ours packed         several trajectories per row
  HF Trainer          torch, sdpa, autocast, --rows_per_batch rows at a time (the paper: 1), full logits in float32
  HF Trainer + Liger  the same with Liger's kernels, on a GPU where liger_kernel is installed

Each runs in its own process, one after the other. Tokens are counted without padding. MFU is the FLOPs of three forward
passes (one forward, two for the backward pass; no recomputation) over the device's matmul rate in the same dtype,
measured in the same run. Losses and gradient norms of every step must agree with ours.
"""

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from finetuning_contestants import CONTESTANTS
from finetuning_request import Request, Result
from measuring import matmul_rate, random_checkpoint, run_contestant, versions
from shapes import SHAPES

from lark_jax.runtime import environment, files
from lark_jax.students import read_architecture
from lark_jax.students.flops import forward_flops

PROMPT_SHARE = 8  # one token in eight is prompt
# For losses and gradient norms, relative to the first contestant. In bfloat16 every layer rounds differently.
AGREEMENT = {"float32": 1e-3, "bfloat16": 5e-2}


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        scratch = Path(folder)
        student = Path(options.student or random_checkpoint(options.shape, "float32", scratch))
        lengths = write_trajectories(student, scratch / "trajectories.npz", options)
        rate = matmul_rate(options.dtype)
        print(f"{environment.hardware()}; {options.dtype} matmul {rate / 1e12:.3f} TFLOP/s; {json.dumps(versions())}")
        results = [run(name, student, scratch, options) for name in options.contestants.split(",")]
        flops = 3 * sum(forward_flops(read_architecture(student), length) for length in lengths)
    print_results(results, sum(lengths), flops, rate)
    if options.out:
        rows = [
            {**asdict(r), "tokens_per_second": sum(lengths) / r.seconds, "mfu": flops / r.seconds / rate}
            for r in results
        ]
        document = {
            "hardware": environment.hardware(),
            "versions": environment.package_versions(),
            "options": vars(options),
            "matmul_flops_per_second": rate,
            "tokens": sum(lengths),
            "flops": flops,
            "results": rows,
        }
        files.write_json(options.out, document)
    check_agreement(results, AGREEMENT[options.dtype])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--shape", choices=sorted(SHAPES), help="random weights in this shape")
    source.add_argument("--student", help="checkpoint folder; see scripts/make_random_student.py")
    parser.add_argument("--trajectories", type=int, default=8, help="of an optimizer step")
    parser.add_argument("--longest", type=int, default=1_024, help="inputs of the longest trajectory, in tokens")
    parser.add_argument("--shortest", type=int, default=256, help="of the shortest; equal to --longest: all the same")
    parser.add_argument("--tokens_per_batch", type=int, default=8_192, help="of ours, padding included")
    parser.add_argument("--rows_per_batch", type=int, default=1, help="of the Trainer")
    parser.add_argument("--vocab_chunk", type=int, default=4_096)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the computation")
    parser.add_argument("--remat", action=argparse.BooleanOptionalAction, default=True, help="recompute layers")
    parser.add_argument("--steps", type=int, default=3, help="timed optimizer steps; the median counts")
    parser.add_argument("--contestants", default=",".join(available_contestants()), help="comma-separated")
    parser.add_argument("--scratch", help="folder for the random checkpoint; default: the system's")
    parser.add_argument("--out", help="JSON file for the figures")
    options = parser.parse_args()
    if not 2 <= options.shortest <= options.longest:
        parser.error("--shortest must be between 2 and --longest")
    if options.trajectories % options.rows_per_batch:
        parser.error("--trajectories must be a multiple of --rows_per_batch, so that all micro-batches are full")
    return options


def available_contestants() -> list[str]:
    """Contestants whose packages are installed; prints to stderr which are skipped."""
    missing = {}
    if importlib.util.find_spec("accelerate") is None:
        missing |= dict.fromkeys(("HF Trainer", "HF Trainer + Liger"), "pip install accelerate")
    elif importlib.util.find_spec("liger_kernel") is None or shutil.which("nvidia-smi") is None:
        missing["HF Trainer + Liger"] = "a GPU and pip install liger-kernel"
    for name, needed in missing.items():
        print(f"skipped: {name} needs {needed}", file=sys.stderr)
    return [name for name in CONTESTANTS if name not in missing]


def write_trajectories(student: Path, path: Path, options: argparse.Namespace) -> list[int]:
    """Returns the inputs of each trajectory: all tokens except the last, which is only predicted."""
    generator = np.random.default_rng(0)
    inputs = np.geomspace(options.shortest, options.longest, options.trajectories).round().astype(int)
    weights = generator.exponential(size=len(inputs))
    np.savez(
        path,
        tokens=generator.integers(0, read_architecture(student).vocab_size, (inputs + 1).sum(), dtype=np.int32),
        lengths=inputs + 1,
        prompts=np.maximum(1, inputs // PROMPT_SHARE),
        weights=weights * len(weights) / weights.sum(),
    )
    return inputs.tolist()


def run(contestant: str, student: Path, scratch: Path, options: argparse.Namespace) -> Result:
    request = Request(
        contestant=contestant,
        student=str(student),
        trajectories=str(scratch / "trajectories.npz"),
        dtype=options.dtype,
        remat=options.remat,
        tokens_per_batch=options.tokens_per_batch,
        vocab_chunk=options.vocab_chunk,
        rows_per_batch=options.rows_per_batch,
        steps=options.steps,
    )
    script = Path(__file__).with_name("finetuning_contestants.py")
    return Result(**run_contestant(script, asdict(request), scratch))


def print_results(results: Sequence[Result], tokens: int, flops: float, rate: float) -> None:
    first = results[0]
    header = ("tokens/s", "first / it", "MFU", "peak GiB", "its / first", "padding", "micro-batches", "max dloss")
    print(f"{'':<24}" + "".join(f"{column:>16}" for column in (*header, "max dgradnorm")))
    for r in results:
        values = (
            f"{tokens / r.seconds:,.0f}",
            f"{r.seconds / first.seconds:.2f}",
            f"{flops / r.seconds / rate:.1%}",
            f"{r.peak_bytes / 2**30:.2f}",
            f"{r.peak_bytes / first.peak_bytes:.2f}",
            f"{r.padding:.1%}",
            f"{r.micro_batches}",
            f"{largest_difference(r.losses, first.losses):.1e}",
            f"{largest_difference(r.grad_norms, first.grad_norms):.1e}",
        )
        print(f"{r.contestant:<24}" + "".join(f"{value:>16}" for value in values))


def largest_difference(values: Sequence[float], others: Sequence[float]) -> float:
    """Relative to `others`."""
    return float(np.max(np.abs(np.array(values) / np.array(others) - 1)))


def check_agreement(results: Sequence[Result], tolerance: float) -> None:
    """Exits with an error if a contestant computes something other than the first one."""
    for result in results[1:]:
        for what in ("losses", "grad_norms"):
            difference = largest_difference(getattr(result, what), getattr(results[0], what))
            if difference > tolerance:
                sys.exit(
                    f"error: {result.contestant}: {what} differ from those of {results[0].contestant} by {difference}"
                )


if __name__ == "__main__":
    main()
