"""Kills an evaluation repeatedly, damages its files, and compares the outcome with an undisturbed evaluation.

    python scripts/kill_evaluation.py --config=configs/tiny.py --run=runs/tiny --student=lark_B1 \\
        --benchmarks=aime24=FILE,amc83=FILE,math500=FILE --out=build/kill_evaluation [--engines=vllm,openai] [--kills=5]

RUN is the working directory after the config's stages up to "export". STUDENT, one of its fine-tuned students, answers
the benchmarks on this machine, with vLLM and with vLLM's server, which is started here. Each kill is a SIGKILL after
some more problems have finished: of the run and its worker together, or of the run only, in turn. Additional arguments
go to the run.

Exit status 0 if, for every engine, killed and damaged evaluations end with byte-identical files, every benchmark has
all its problems, prompts are the token ids that transformers gives, and the engines agree.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from vllm_server import serving

from lark_jax.evaluation.benchmark_records import BenchmarkProblem
from lark_jax.evaluation.prompts import load_system_prompts, prompt_messages
from lark_jax.evaluation.runner import GENERATIONS
from lark_jax.runtime import files

MAX_WAIT_S = 1_800.0  # for the next problem
MAX_MODEL_LEN = 4_096  # of the server


@dataclass(frozen=True)
class Evaluation:
    """A copy of the run in which one student is evaluated."""

    workdir: Path
    student: str
    command: tuple[str, ...]

    @property
    def generations(self) -> Path:
        return self.workdir / "generations" / self.student / GENERATIONS

    @property
    def results(self) -> Path:
        return self.workdir / "evaluate" / self.student

    def start(self) -> "subprocess.Popen[bytes]":
        log = self.workdir.with_suffix(".log").open("ab")
        return subprocess.Popen(
            self.command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, "no_proxy": "127.0.0.1"}
        )

    def finish(self) -> float:
        """Runs to the end; returns the seconds that it took.

        Raises:
          RuntimeError: the run failed.
        """
        begun = time.monotonic()
        if status := self.start().wait():
            raise RuntimeError(f"the run ended with status {status}; see {self.workdir.with_suffix('.log')}")
        return time.monotonic() - begun

    def finished_problems(self) -> int:
        partial = self.generations.with_name(GENERATIONS + ".partial")
        return max(partial.read_bytes().count(b"\n") - 1, 0) if partial.exists() else 0

    def content(self) -> dict[str, bytes]:
        """All its files, by name."""
        names = sorted(self.results.glob("*/samples.jsonl"))
        found = [self.generations, *names, self.results / "samples.parquet", self.results / "summary.json"]
        return {str(path.relative_to(self.workdir)): path.read_bytes() for path in found}


def evaluation_in(workdir: Path, engine: str, options: argparse.Namespace) -> Evaluation:
    """A copy of the run without its evaluations."""
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(options.run, workdir, ignore=shutil.ignore_patterns("evaluate", "generations", "checkpoints"))
    command = (
        sys.executable, "-m", "lark_jax.run", f"--config={options.config}", "--config.stages=evaluate",
        f"--config.workdir={workdir}", f"--config.evaluate.engine={engine}", "--config.evaluate.include_base=False",
        "--config.evaluate.system_prompts=by_kind", f"--config.evaluate.samples={options.samples}",
        f"--config.evaluate.max_tokens={options.max_tokens}",
        f"--config.evaluate.benchmarks={tuple(options.benchmarks.split(','))!r}", *options.rest,
    )  # fmt: skip
    return Evaluation(workdir, options.student, command)


def kill_repeatedly(evaluation: Evaluation, kills: int, total: int, draw: random.Random) -> None:
    """Kills it `kills` times, then lets it finish.

    Raises:
      RuntimeError: it finished too early, or makes no progress.
    """
    for number in range(kills):
        before = evaluation.finished_problems()
        process = evaluation.start()
        _wait_for(evaluation, process, before + draw.randint(1, max(1, (total - before) // (kills - number + 2))))
        os.kill(process.pid, signal.SIGKILL) if number % 2 else os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        after = evaluation.finished_problems()
        print(f"  kill {number + 1}: {before} problems before, {after} after, of {total}", flush=True)
        if after >= total:
            raise RuntimeError("the evaluation finished before it could be killed; use more --samples")
    evaluation.finish()


def _wait_for(evaluation: Evaluation, process: "subprocess.Popen[bytes]", problems: int) -> None:
    deadline = time.monotonic() + MAX_WAIT_S
    while evaluation.finished_problems() < problems:
        if process.poll() is not None:
            raise RuntimeError(f"the run ended on its own with status {process.returncode}")
        if time.monotonic() > deadline:
            raise RuntimeError("the run makes no progress")
        time.sleep(0.002)


def damage(evaluation: Evaluation, draw: random.Random) -> None:
    """Loses one line, garbles one, empties one, cuts the last one short, and deletes the results."""
    header, *lines = evaluation.generations.read_bytes().splitlines(keepends=True)
    lost, garbled, other = draw.sample(range(len(lines) - 1), 3)
    lines[garbled] = bytes(draw.choices(range(32, 127), k=len(lines[garbled]) - 1)) + b"\n"
    lines[other] = json.dumps({**json.loads(lines[other]), "samples": []}).encode() + b"\n"
    lines[-1] = lines[-1][: len(lines[-1]) // 2]
    del lines[lost]
    evaluation.generations.write_bytes(header + b"".join(lines))
    shutil.rmtree(evaluation.results)


def require_whole_benchmarks(evaluation: Evaluation) -> int:
    """Every benchmark has all its problems, seeds and samples; returns the number of lines of generations."""
    summary = files.read_json(evaluation.results / "summary.json")
    total = 0
    for result in summary["benchmarks"]:
        problems = _lines(evaluation.workdir / "evaluate" / "benchmarks" / f"{result['benchmark']}.jsonl")
        rows = _lines(evaluation.results / result["benchmark"] / "samples.jsonl")
        seeds = len(result["seeds"])
        print(f"  {result['benchmark']}: {len(problems)} problems, {len(rows)} samples under {seeds} seeds, "
              f"Acc@{result['samples']} {result['by_k'][-1]['mean']:.4f}")  # fmt: skip
        if not result["num_problems"] == len(problems) or len(rows) != len(problems) * seeds * result["samples"]:
            raise RuntimeError(f"{result['benchmark']}: problems or samples are missing")
        total += len(problems) * seeds
    return total


def require_prompts_of_transformers(evaluation: Evaluation, tokenizer: Any) -> None:
    """The prompts of the worker's request are the token ids of `apply_chat_template`."""
    request = files.read_json(evaluation.generations.with_name("worker.request.json"))
    texts = load_system_prompts("by_kind")
    problems = {
        (path.stem, problem["problem_id"]): BenchmarkProblem(**problem)
        for path in (evaluation.workdir / "evaluate" / "benchmarks").glob("*.jsonl")
        for problem in _lines(path)
    }
    if len(request["prompts"]) != len(problems):
        raise RuntimeError(f"{len(request['prompts'])} prompts for {len(problems)} problems")
    for prompt in request["prompts"]:
        messages = prompt_messages(problems[prompt["benchmark"], prompt["problem_id"]], texts)
        turns = [{"role": message.role, "content": message.content} for message in messages]
        expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        if prompt["tokens"] != list(expected):
            raise RuntimeError(f"{prompt['benchmark']}/{prompt['problem_id']}: not the tokens of transformers")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def require_equal(expected: Mapping[str, bytes], found: Mapping[str, bytes], what: str) -> None:
    differing = [name for name in expected if found.get(name) != expected[name]]
    if differing:
        raise RuntimeError(f"{what}: differs in {', '.join(differing)}")
    print(f"  {what}: {len(expected)} files, {sum(map(len, expected.values())):,} bytes, identical", flush=True)


def check_engine(engine: str, options: argparse.Namespace, draw: random.Random) -> list[bytes]:
    """All checks of one engine; returns its generations without the header, which names the request."""
    print(f"{engine}:", flush=True)
    whole = evaluation_in(options.out / engine / "whole", engine, options)
    print(f"  undisturbed: {whole.finish():.0f} s", flush=True)
    total = require_whole_benchmarks(whole)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(whole.workdir / "export" / options.student / "student")
    require_prompts_of_transformers(whole, tokenizer)
    killed = evaluation_in(options.out / engine / "killed", engine, options)
    kill_repeatedly(killed, options.kills, total, draw)
    require_equal(whole.content(), killed.content(), f"killed {options.kills} times")
    damage(killed, draw)
    killed.finish()
    require_equal(whole.content(), killed.content(), "four lines lost or damaged")
    require_whole_benchmarks(killed)
    return whole.generations.read_bytes().splitlines()[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--benchmarks", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--engines", default="vllm,openai")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--max_tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, help="for kills and damage; random by default")
    options, options.rest = parser.parse_known_args()
    options.out = options.out.resolve()
    draw = random.Random(options.seed)
    generations = {}
    with contextlib.ExitStack() as servers:
        for engine in options.engines.split(","):
            if engine == "openai":
                student = options.run / "export" / options.student / "student"
                url = servers.enter_context(serving(student, "served", MAX_MODEL_LEN, options.out / "server"))
                options.rest += [f"--config.evaluate.server={url}", "--config.evaluate.server_model=served"]
            generations[engine] = check_engine(engine, options, draw)
    if any(found != generations["vllm"] for found in generations.values()):
        raise SystemExit("the engines disagree")
    print(f"{' and '.join(generations)}: {len(generations['vllm'])} identical lines of samples")


if __name__ == "__main__":
    main()
