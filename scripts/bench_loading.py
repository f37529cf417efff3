"""Loading speed and host memory: ours against reading the same files, and against transformers on torch.

    python scripts/bench_loading.py --shape=qwen2.5-7b [--layers=4] [--cache=cold] --out=F.json
    python scripts/bench_loading.py --student=FOLDER --out=F.json

With --shape, random weights are written first, in files of --shard_gib, and deleted afterwards. The contestants:

  read, 1 thread         all files into one small, reused buffer: the minimum for any loader
  read, 4 threads        the same, with one buffer per thread
  read, kept             the files into their own memory: the minimum where parameters are host memory
  ours, read only        `load_student` as for an accelerator, but every piece is dropped before its transfer
  ours                   `load_student` on all local devices, sharded over them
  transformers           `from_pretrained` on torch, CPU, and a sum over each parameter, because it may only map files

Each runs in its own process, in turn, --rounds times. Before each run the files are dropped from the operating system's
cache (--cache=cold) or read once (warm). Time starts after imports. CPU seconds are those of all threads; on a busy
machine they are more reliable than the clock. Memory is the peak of anonymous memory (RssAnon: without mapped files and
the file cache) above its value before loading; `above parameters` subtracts the parameters in host memory, which on the
CPU are the destination itself.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from make_random_student import write_random_weights
from shapes import SHAPES

from lark_jax.runtime import environment, files, terminal

SMALL_BUFFER, LARGE_BUFFER = 1 << 20, 8 << 20
SAMPLE_SECONDS = 0.005


@dataclass(frozen=True)
class Result:
    contestant: str
    seconds: float
    cpu_seconds: float
    parameter_bytes: int  # in host memory
    peak_bytes: int  # anonymous memory above its value before loading

    @property
    def above_parameters(self) -> int:
        return self.peak_bytes - self.parameter_bytes


def main() -> None:
    options = parse_arguments()
    if options.contestant:
        print(json.dumps(asdict(measure(options.contestant, Path(options.student), options))))
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        student = Path(options.student or random_checkpoint(options, Path(scratch) / "student"))
        num_bytes = sum(file.stat().st_size for file in weight_files(student))
        print(f"{environment.hardware()}; {json.dumps(environment.package_versions())}")
        print(f"{len(weight_files(student))} files, {num_bytes / 1e9:.2f} GB, cache {options.cache}")
        rounds = [
            [run_contestant(name, student, options) for name in CONTESTANTS if name not in options.without]
            for _ in range(options.rounds)
        ]
    report = summarize(rounds, num_bytes)
    print_report(report)
    if options.out:
        document = {
            "hardware": environment.hardware(),
            "versions": environment.package_versions(),
            "options": vars(options),
            "file_bytes": num_bytes,
            "results": report,
        }
        files.write_json(options.out, document)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--shape", choices=sorted(SHAPES), help="random weights in this shape")
    source.add_argument("--student", help="checkpoint folder")
    parser.add_argument("--layers", type=int, help="of the random weights; default: all")
    parser.add_argument("--vocab", type=int, help="of the random weights; default: the shape's")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the files")
    parser.add_argument("--param_dtype", choices=("bfloat16", "float32"), help="of our parameters; default: --dtype")
    parser.add_argument("--shard_gib", type=float, default=4.0, help="size of a file")
    parser.add_argument("--cache", choices=("cold", "warm"), default="cold")
    parser.add_argument("--rounds", type=int, default=3, help="the report gives the median")
    parser.add_argument("--without", default="", help="contestants to leave out, comma-separated")
    parser.add_argument("--scratch", help="folder for the random weights; default: the system's")
    parser.add_argument("--out", help="JSON file for the figures")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)  # in the process that is measured
    options = parser.parse_args()
    options.without = tuple(filter(None, options.without.split(",")))
    if unknown := set(options.without) - set(CONTESTANTS):
        parser.error(f"--without: unknown {', '.join(sorted(unknown))}; known: {', '.join(CONTESTANTS)}")
    return options


def random_checkpoint(options: argparse.Namespace, folder: Path) -> Path:
    config = dict(SHAPES[options.shape])
    config["num_hidden_layers"] = options.layers or config["num_hidden_layers"]
    config["vocab_size"] = options.vocab or config["vocab_size"]
    terminal.say(f"writing random weights, {options.shape}, {config['num_hidden_layers']} layers")
    shard_bytes = int(options.shard_gib * 2**30)
    write_random_weights(config, folder, dtype=options.dtype, shard_bytes=shard_bytes, seed=0)
    return folder


def weight_files(student: Path) -> list[Path]:
    return sorted(student.glob("*.safetensors"))


def run_contestant(name: str, student: Path, options: argparse.Namespace) -> Result:
    prepare_cache(weight_files(student), options.cache)
    command = [sys.executable, __file__, f"--student={student}", f"--contestant={name}", f"--dtype={options.dtype}"]
    if options.param_dtype:
        command.append(f"--param_dtype={options.param_dtype}")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {name}: exit status {done.returncode}, see its message above")
    result = Result(**json.loads(done.stdout.splitlines()[-1]))
    terminal.say(f"{name}: {result.seconds:.2f} s")
    return result


def prepare_cache(paths: list[Path], state: str) -> None:
    if state == "warm":
        read_into_one_buffer(paths, SMALL_BUFFER, 1)
        return
    for path in paths:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())  # only clean pages leave the cache
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(name: str, student: Path, options: argparse.Namespace) -> Result:
    load = CONTESTANTS[name](student, options)
    before = anonymous_bytes()
    with peak_memory() as peak:
        start, cpu_start = time.perf_counter(), time.process_time()
        parameter_bytes = load()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return Result(name, seconds, cpu_seconds, parameter_bytes, peak[0] - before)


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """A list that holds the peak of anonymous memory after the block."""
    peak, ended = [anonymous_bytes()], threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            peak[0] = max(peak[0], anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield peak
    finally:
        ended.set()
        sampler.join()
        peak[0] = max(peak[0], anonymous_bytes())


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def reading(buffer_bytes: int, num_threads: int, student: Path, _: argparse.Namespace) -> Callable[[], int]:
    return partial(read_into_one_buffer, weight_files(student), buffer_bytes, num_threads)


def read_into_one_buffer(paths: list[Path], buffer_bytes: int, num_threads: int) -> int:
    """Reads all files in order; each thread reuses one buffer."""
    own = threading.local()

    def read(stream_and_offset: tuple) -> None:
        stream, offset = stream_and_offset
        if not hasattr(own, "buffer"):
            own.buffer = bytearray(buffer_bytes)
        os.preadv(stream.fileno(), [own.buffer], offset)

    with ThreadPoolExecutor(num_threads) as pool:
        for path in paths:
            with path.open("rb", buffering=0) as stream:
                offsets = range(0, path.stat().st_size, buffer_bytes)
                list(pool.map(read, ((stream, offset) for offset in offsets)))
    return 0


def reading_kept(student: Path, _: argparse.Namespace) -> Callable[[], int]:
    def load() -> int:
        kept = [np.empty(path.stat().st_size, np.uint8) for path in weight_files(student)]

        def read(stream, values: np.ndarray, offset: int) -> None:
            os.preadv(stream.fileno(), [values[offset : offset + LARGE_BUFFER].data], offset)

        with ThreadPoolExecutor(4) as pool:
            for path, values in zip(weight_files(student), kept, strict=True):
                with path.open("rb", buffering=0) as stream:
                    list(pool.map(partial(read, stream, values), range(0, values.size, LARGE_BUFFER)))
        return sum(values.nbytes for values in kept)

    return load


def ours(student: Path, options: argparse.Namespace) -> Callable[[], int]:
    import jax
    from flax import nnx

    from lark_jax.config import MeshConfig
    from lark_jax.runtime.sharding import make_mesh
    from lark_jax.students import load_student

    mesh = make_mesh(MeshConfig())
    param_dtype = options.param_dtype or options.dtype
    jax.block_until_ready(jax.numpy.zeros(()))

    def load() -> int:
        model, _ = load_student(student, mesh=mesh, dtype=options.dtype, param_dtype=param_dtype)
        leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model, nnx.Param)))
        return sum(leaf.nbytes for leaf in leaves) if jax.default_backend() == "cpu" else 0

    return load


def ours_read_only(student: Path, options: argparse.Namespace) -> Callable[[], int]:
    import jax

    from lark_jax.students.checkpoint import loading
    from lark_jax.students.checkpoint.placement import DeviceDestination, Piece, Target

    class Dropped(DeviceDestination):
        def __init__(self, target: Target) -> None:
            self._target = target

        def store(self, piece: Piece, fetched: dict) -> None:
            del piece, fetched

        def finish(self) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(self._target.shape, self._target.dtype)

    def load() -> int:
        param_dtype = options.param_dtype or options.dtype
        loading.load_student(student, dtype=options.dtype, param_dtype=param_dtype)
        return 0

    loading.destination_for = Dropped
    jax.block_until_ready(jax.numpy.zeros(()))
    return load


def transformers(student: Path, options: argparse.Namespace) -> Callable[[], int]:
    import torch
    from transformers import AutoModelForCausalLM

    def load() -> int:
        model = AutoModelForCausalLM.from_pretrained(student, dtype=getattr(torch, options.dtype))
        parameters = list(model.parameters())
        for parameter in parameters:
            parameter.detach().view(torch.uint8).flatten()[:: os.sysconf("SC_PAGE_SIZE")].sum()
        return sum(parameter.nbytes for parameter in parameters)

    return load


CONTESTANTS: dict[str, Callable[[Path, argparse.Namespace], Callable[[], int]]] = {
    "read, 1 thread": partial(reading, SMALL_BUFFER, 1),
    "read, 4 threads": partial(reading, LARGE_BUFFER, 4),
    "read, kept": reading_kept,
    "ours, read only": ours_read_only,
    "ours": ours,
    "transformers": transformers,
}

OURS = ("ours, read only", "ours")


def summarize(rounds: list[list[Result]], num_bytes: int) -> list[dict]:
    """One row per contestant: its times, the medians of our rate over its rate per round, and its peak memory."""
    rows = []
    for results in zip(*rounds, strict=True):
        name = results[0].contestant
        row = {
            "contestant": name,
            "seconds": [result.seconds for result in results],
            "cpu_seconds": [result.cpu_seconds for result in results],
            "bytes_per_second": num_bytes / statistics.median(result.seconds for result in results),
            "bytes_per_cpu_second": num_bytes / statistics.median(result.cpu_seconds for result in results),
            "peak_bytes": max(result.peak_bytes for result in results),
            "above_parameters": max(result.above_parameters for result in results),
        }
        for own_name in OURS:
            own = [result for one in rounds for result in one if result.contestant == own_name]
            if own:
                row[f"{own_name} / it"] = statistics.median(
                    theirs.seconds / mine.seconds for theirs, mine in zip(results, own, strict=True)
                )
        rows.append(row)
    return rows


def print_report(rows: list[dict]) -> None:
    ratios = [f"{name} / it" for name in OURS if f"{name} / it" in rows[0]]
    columns = ("GB/s", "GB/CPU s", *ratios, "peak GiB", "above parameters")
    print(f"{'':<18}" + "".join(f"{column:>24}" for column in columns))
    for row in rows:
        rates = (f"{row[key] / 1e9:.2f}" for key in ("bytes_per_second", "bytes_per_cpu_second"))
        memory = (f"{row['peak_bytes'] / 2**30:.2f}", f"{row['above_parameters'] / 2**30:.2f} GiB")
        values = (*rates, *(f"{row[ratio]:.2f}" for ratio in ratios), *memory)
        print(f"{row['contestant']:<18}" + "".join(f"{value:>24}" for value in values))


if __name__ == "__main__":
    main()
