"""Local Naturalness against one pass of cross-entropy (GRAPE) over the same trajectories: time and FLOPs, one run.

    python scripts/bench_local_naturalness.py --pool=POOL.jsonl --tokenizer=FOLDER --problems=2 --out=F.json
    python scripts/bench_local_naturalness.py --pool=POOL.jsonl --tokenizer=FOLDER --problems=1 --join=22 --out=F.json
    python scripts/bench_local_naturalness.py --pool=POOL.jsonl --tokenizer=FOLDER --problems=450 --rounds=0

A student of --shape gets random weights. --join concatenates so many answers of a problem, which makes long
trajectories with steps of real length. Batches are made and programs compiled before the clock starts: what is timed,
in turns, is the work of the device, padding included. --rounds=0 only counts FLOPs, for all shapes.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from measuring import versions
from shapes import SHAPES

from lark_jax.config import MeshConfig
from lark_jax.pool import read_pool
from lark_jax.pool.records import Message, Pool, Trajectory
from lark_jax.rendering.batching import TokenRows, assemble
from lark_jax.rendering.chat import ChatFormat, RenderedTrajectory, load_chat_format, render_trajectories
from lark_jax.runtime import environment, files
from lark_jax.runtime.sharding import make_mesh
from lark_jax.scoring import token_statistics
from lark_jax.scoring.local_naturalness import NaturalnessOptions, Work, plan_work
from lark_jax.scoring.local_naturalness.cost import windows_over_one_pass
from lark_jax.scoring.local_naturalness.programs import WindowPrograms
from lark_jax.scoring.local_naturalness.work import Sizes, render_part
from lark_jax.scoring.workload import plan_pool
from lark_jax.students import Decoder, random_student
from lark_jax.students.architecture import architecture_from_config


@dataclasses.dataclass(frozen=True)
class Contestant:
    run: Callable[[], list[np.ndarray]]
    padding: float  # share of the tokens that go through the layers


def main() -> None:
    options = parse_arguments()
    chat = load_chat_format(options.tokenizer, options.chat_template)
    pool = some_of(read_pool(options.pool), options.problems, options.answers, options.join)
    limits = NaturalnessOptions(options.max_length, options.tokens_per_batch, options.vocab_chunk, options.context)
    work = plan_work(pool, chat, limits, data_shards=1, directory=Path("not-written"))
    report = {**describe(work), "options": vars(options), "flops": flop_ratios(work)}
    print(f"{environment.hardware()}; {work}")
    print("FLOPs over one pass: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in report["flops"].items()))
    if options.rounds:
        report["measured"] = measured(work, chat, options)
        print("measured: {seconds_over_one_pass:.2f} times the seconds of one pass".format(**report["measured"]))
    if options.out:
        files.write_json(options.out, {"hardware": environment.hardware(), "versions": versions("jaxlib"), **report})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", required=True, help=".jsonl or .parquet")
    parser.add_argument("--tokenizer", required=True, help="folder with tokenizer.json")
    parser.add_argument("--chat_template", help="Jinja file, for tokenizers without a template")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2.5-0.5b", help="of the student")
    parser.add_argument("--problems", type=int, default=2, help="of the pool, evenly spaced, with all their answers")
    parser.add_argument("--answers", type=int, help="of each problem, evenly spaced; default: all")
    parser.add_argument("--join", type=int, default=1, help="answers of a problem to concatenate into one")
    parser.add_argument("--context", type=int, default=4, help="m")
    parser.add_argument("--max_length", type=int, default=32_768)
    parser.add_argument("--tokens_per_batch", type=int, default=8_192)
    parser.add_argument("--vocab_chunk", type=int, default=4_096)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3, help="of both, in turns; the median ratio is reported")
    parser.add_argument("--out", help="JSON file for the figures")
    return parser.parse_args()


def some_of(pool: Pool, problems: int, most_answers: int | None, join: int) -> Pool:
    by_problem: dict[str, list[Trajectory]] = {}
    for trajectory in pool.trajectories:
        by_problem.setdefault(trajectory.problem_id, []).append(trajectory)
    chosen = [spaced(answers, most_answers) for answers in spaced(list(by_problem.values()), problems)]
    starts = ((answers, start) for answers in chosen for start in range(0, len(answers), join))
    return Pool(tuple(joined(answers[start : start + join]) for answers, start in starts))


def spaced(items: Sequence, most: int | None) -> Sequence:
    most = most or len(items)
    return items[:: max(1, len(items) // most)][:most]


def joined(some: Sequence[Trajectory]) -> Trajectory:
    text = "\n\n".join(trajectory.response for trajectory in some)
    return dataclasses.replace(some[0], messages=(*some[0].prompt, Message("assistant", text)))


def describe(work: Work) -> dict[str, float]:
    sizes = [size for size in work.sizes if isinstance(size, Sizes)]
    targets = [int(size.steps.sum()) for size in sizes]
    return {
        "trajectories": len(sizes),
        "mean_prompt_tokens": float(np.mean([size.prompt for size in sizes])),
        "mean_target_tokens": float(np.mean(targets)),
        "longest_target_tokens": max(targets),
        "mean_steps": float(np.mean([len(size.steps) for size in sizes])),
        "window_tokens_over_target_tokens": work.window_tokens / sum(targets),
    }


def flop_ratios(work: Work) -> dict[str, float]:
    return {name: windows_over_one_pass(architecture_from_config(dict(shape)), work) for name, shape in SHAPES.items()}


def measured(work: Work, chat: ChatFormat, options: argparse.Namespace) -> dict[str, object]:
    student = random_student(architecture_from_config(dict(SHAPES[options.shape])), 0, options.dtype)
    contestants = {"one pass": one_pass(student, work, chat), "windows": windows(student, work)}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(options.rounds + 1):
        for name, contestant in contestants.items():
            start = time.perf_counter()
            contestant.run()
            if number:  # the first round compiles
                seconds[name].append(time.perf_counter() - start)
    ratio = np.median(np.divide(seconds["windows"], seconds["one pass"]))
    padding = {name: contestant.padding for name, contestant in contestants.items()}
    return {"shape": options.shape, "seconds": seconds, "padding": padding, "seconds_over_one_pass": float(ratio)}


def one_pass(student: Decoder, work: Work, chat: ChatFormat) -> Contestant:
    """What GRAPE needs: the scorer's batches and forward pass, with the cross-entropy as the only result."""
    options = work.options
    rendered = [
        item
        for item in render_trajectories(chat, work.pool.trajectories, options.max_length)
        if isinstance(item, RenderedTrajectory)
    ]
    plans = plan_pool([item.num_inputs for item in rendered], options.tokens_per_batch, 1)
    batches = [assemble(rendered, plan, chat.pad_id) for plan in plans]
    graph, state = nnx.split(student)

    @jax.jit
    def losses(state: nnx.State, tokens_bt: jax.Array, targets_bt: jax.Array, mask_bt: jax.Array) -> jax.Array:
        model = nnx.merge(graph, state)
        head = model.head_weight()
        statistics = token_statistics(model(tokens_bt), head, targets_bt, vocab_chunk=options.vocab_chunk)
        return (statistics.cross_entropy * mask_bt).sum(-1) / mask_bt.sum(-1)

    def loss(batch: TokenRows) -> jax.Array:
        return losses(state, batch.tokens_bt, batch.targets_bt, batch.mask_bt)

    padding = 1 - sum(item.num_inputs for item in rendered) / sum(batch.tokens_bt.size for batch in batches)
    return Contestant(lambda: jax.device_get([loss(batch) for batch in batches]), padding)


def windows(student: Decoder, work: Work) -> Contestant:
    parts = [render_part(work, part, {}) for part in work.parts]
    programs = WindowPrograms(student, make_mesh(MeshConfig(), jax.devices()[:1]), work.options.vocab_chunk)

    def run() -> list[np.ndarray]:
        scores = []
        for part in parts:
            prefixes = programs.encode(part.prompts_ns)
            scores += jax.device_get([programs.log_likelihoods(prefixes, batch) for batch in part.batches])
        return scores

    padded = sum(batch.tokens_bt.size for part in parts for batch in part.batches)
    return Contestant(run, 1 - work.window_tokens / padded)


if __name__ == "__main__":
    main()
