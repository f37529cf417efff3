"""Interrupts a small training run repeatedly, lets it finish, and compares it with an undisturbed run.

    python scripts/kill_and_resume.py --kills=20 --terms=5 [--steps=150] [--seed=0] [--folder=FOLDER]

A kill is SIGKILL at a random moment, while the program starts, restores, trains or writes a checkpoint (after every
step). A term is SIGTERM: the run must exit by itself with status 143 and a checkpoint of its last step. The exit status
is 0 if weights and logs have the same bytes and no SIGTERM lost a step.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from lark_jax.config import FinetuneConfig, MeshConfig
from lark_jax.errors import StoppedBySignal
from lark_jax.finetuning import CHECKPOINTS, Example, finetune
from lark_jax.rendering.chat import RenderedTrajectory
from lark_jax.runtime.sharding import make_mesh
from lark_jax.students import random_student
from lark_jax.students.architecture import Architecture, RopeScaling
from lark_jax.students.parameters import flatten_parameters

WEIGHTS = "weights.npz"
COMPARED = ("metrics.jsonl", "held_out.jsonl")
LONGEST_WAIT = 600  # seconds without progress
BATCH_SIZE = 4
# 15 MB with its moments: writing it takes about as long as a step.
ARCHITECTURE = Architecture(
    model_type="qwen2",
    vocab_size=4_096,
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    rope_scaling=RopeScaling(),
    max_position_embeddings=256,
    tie_word_embeddings=False,
    attention_bias=True,
    qk_norm=False,
)


@dataclass(frozen=True)
class Interruption:
    """The state of a run after an interruption."""

    number: signal.Signals
    status: int  # of the process
    steps: int  # in metrics.jsonl
    checkpoint: int  # step of the newest complete one; 0 without any
    saving: bool  # there was a partial one

    @property
    def lost(self) -> int:
        return self.steps - self.checkpoint

    def __str__(self) -> str:
        what = "in the middle of a save, " if self.saving else ""
        return (
            f"{self.number.name}: status {self.status}, {what}{self.steps} steps logged, checkpoint at "
            f"{self.checkpoint}, {self.lost} lost"
        )


def train(directory: Path, steps: int) -> None:
    """Runs in the child processes."""
    generator = np.random.default_rng(0)
    examples = [_random_example(generator, f"p{index}") for index in range(10 * BATCH_SIZE)]
    config = FinetuneConfig(
        learning_rate=1e-3,
        epochs=-(-steps // 10),
        batch_size=BATCH_SIZE,
        dtype="float32",
        tokens_per_batch=256,
        checkpoint_every=1,
        evaluate_every=7,
    )
    result = finetune(
        random_student(ARCHITECTURE, 0, "float32"),
        examples,
        config,
        seed=0,
        mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
        pad_id=0,
        directory=directory,
        held_out=[_random_example(generator, f"h{index}") for index in range(BATCH_SIZE)],
    )
    weights = flatten_parameters(nnx.state(result.student, nnx.Param))
    np.savez(directory / WEIGHTS, **{name: np.asarray(value) for name, value in weights.items()})


def interrupt(directory: Path, cache: Path, steps: int, number: signal.Signals, draw: random.Random) -> Interruption:
    """Starts or continues the run and sends it a signal at a random moment.

    Raises:
      RuntimeError: the run finished before the signal.
    """
    process = start(directory, cache, steps)
    before = logged_steps(directory)
    if number == signal.SIGKILL and draw.random() < 0.25:
        time.sleep(draw.uniform(0.0, 5.0))  # starting, compiling, restoring
    else:
        wait_for_steps(process, directory, before + draw.randint(1, 5))
        time.sleep(draw.uniform(0.0, 0.3))
    process.send_signal(number)
    status = process.wait()
    if (directory / WEIGHTS).exists():
        raise RuntimeError("the run finished before it could be interrupted; use more --steps")
    names = [path.name for path in (directory / CHECKPOINTS).glob("*")]
    newest = max((int(name) for name in names if name.isdecimal()), default=0)
    saving = any("tmp" in name for name in names)
    return Interruption(number, status, logged_steps(directory), newest, saving)


def start(directory: Path, cache: Path, steps: int) -> "subprocess.Popen[str]":
    directory.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, __file__, f"--train={directory}", f"--steps={steps}"]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(directory: Path, cache: Path, steps: int) -> None:
    process = start(directory, cache, steps)
    _, messages = process.communicate(timeout=LONGEST_WAIT)
    if process.returncode != 0:
        raise RuntimeError(f"the run ended with status {process.returncode}: {messages[-2000:]}")


def logged_steps(directory: Path) -> int:
    metrics = directory / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def wait_for_steps(process: "subprocess.Popen[str]", directory: Path, steps: int) -> None:
    deadline = time.monotonic() + LONGEST_WAIT
    while logged_steps(directory) < steps:
        if process.poll() is not None:
            raise RuntimeError(f"the run ended by itself with status {process.returncode}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"no progress within {LONGEST_WAIT} seconds")
        time.sleep(0.002)


def differences(one: Path, other: Path) -> list[str]:
    """Names of the arrays and logs whose bytes differ."""
    differing = [name for name in COMPARED if (one / name).read_bytes() != (other / name).read_bytes()]
    with np.load(one / WEIGHTS) as first, np.load(other / WEIGHTS) as second:
        if sorted(first.files) != sorted(second.files):
            return [*differing, "names of the parameters"]
        return differing + [name for name in first.files if first[name].tobytes() != second[name].tobytes()]


def run(folder: Path, signals: Sequence[signal.Signals], steps: int, draw: random.Random) -> tuple[list[str], int]:
    """Prints every interruption; returns what differs in the end and how many steps SIGTERM lost."""
    cache = folder / "cache"
    finish(folder / "undisturbed", cache, steps)
    seen = []
    for number in signals:
        seen.append(interrupt(folder / "interrupted", cache, steps, number, draw))
        print(f"{len(seen):>3}  {seen[-1]}", flush=True)
    finish(folder / "interrupted", cache, steps)
    terms = [interruption for interruption in seen if interruption.number == signal.SIGTERM]
    expected = 128 + signal.SIGTERM
    if any(interruption.status != expected for interruption in terms):
        raise RuntimeError(f"a run did not end with status {expected} after SIGTERM")
    kills = [interruption for interruption in seen if interruption.number == signal.SIGKILL]
    print(f"{len(kills)} kills, {sum(kill.saving for kill in kills)} of them in the middle of a save")
    return differences(folder / "undisturbed", folder / "interrupted"), sum(term.lost for term in terms)


def _random_example(generator: np.random.Generator, name: str) -> Example:
    def tokens(most: int) -> np.ndarray:
        return generator.integers(1, ARCHITECTURE.vocab_size, generator.integers(1, most), dtype=np.int32)

    rendered = RenderedTrajectory(name, "c", tokens(20), tokens(40), truncated=False)
    return Example(rendered, weight=float(generator.uniform(0.5, 1.5)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--terms", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200, help="of the whole run; a multiple of 10")
    parser.add_argument("--seed", type=int, default=None, help="of the random moments; by default a new one every time")
    parser.add_argument(
        "--folder", type=Path, default=None, help="working directory, kept afterwards; by default a temporary one"
    )
    parser.add_argument("--train", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train is not None:
        try:
            train(options.train, options.steps)
        except StoppedBySignal as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(stopped.exit_status)
        return
    draw = random.Random(options.seed)
    signals = [signal.SIGKILL] * options.kills + [signal.SIGTERM] * options.terms
    draw.shuffle(signals)
    with tempfile.TemporaryDirectory() as temporary:
        differing, lost = run(options.folder or Path(temporary), signals, options.steps, draw)
    print(f"steps that SIGTERM lost: {lost}")
    print(f"differs: {', '.join(differing)}" if differing else "weights and logs: the same bytes")
    sys.exit(1 if differing or lost else 0)


if __name__ == "__main__":
    main()
