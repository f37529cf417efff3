"""What a student is asked: system prompts, the messages for a problem, and their tokens, rendered once per student."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from lark_jax.errors import EvaluationError
from lark_jax.evaluation.benchmark_records import KINDS, Benchmark, BenchmarkProblem, parse_json, read_text
from lark_jax.evaluation.benchmarks import require_distinct
from lark_jax.evaluation.worker.worker_records import Prompt
from lark_jax.pool.records import Message
from lark_jax.rendering.chat import ChatFormat, RenderRefusal, opens_thought, render_prompt

# One text per kind of answer, as in Appendix C.4 of the paper: English, reasoning first, then one boxed answer.
_SYSTEM_PROMPT = (
    "You solve problems carefully. Write everything in English. Reason first, as long as you need. "
    "When you are done, write \\boxed{%s} alone on a new last line, %s"
)
BY_KIND: Mapping[str, str] = MappingProxyType(
    {
        "number": _SYSTEM_PROMPT % ("<number>", "with nothing but the final number inside the box."),
        "letter": _SYSTEM_PROMPT % ("<letter>", "with nothing but the letter of the right choice inside the box."),
        "expression": _SYSTEM_PROMPT % ("<answer>", "with nothing but the final answer inside the box."),
    }
)
BUILT_IN_PROMPTS: Mapping[str, Mapping[str, str]] = MappingProxyType({"by_kind": BY_KIND, "none": MappingProxyType({})})


@dataclass(frozen=True)
class StudentPrompts:
    """Every problem of every benchmark as one student is asked it."""

    prompts: tuple[Prompt, ...]
    open_thoughts: frozenset[tuple[str, str]]  # (benchmark, problem id) of prompts that end with an open `<think>`
    end_of_turn_id: int
    pad_id: int


def load_system_prompts(choice: str) -> Mapping[str, str]:
    """Kind -> system prompt for `evaluate.system_prompts`: "by_kind" (built in), "none", or a JSON file {kind: text}.

    Raises:
      EvaluationError: the file is missing, is not an object of texts, or names an unknown kind.
    """
    if choice in BUILT_IN_PROMPTS:
        return BUILT_IN_PROMPTS[choice]
    path = Path(choice)
    prompts = parse_json(read_text(path), str(path))
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise EvaluationError(f"{path}: expected one JSON object of texts, {{kind: system prompt}}")
    for kind in prompts:
        if kind not in KINDS:
            raise EvaluationError(f"{path}: unknown kind {kind!r}; known kinds: {', '.join(KINDS)}")
    return MappingProxyType(prompts)


def prompt_messages(problem: BenchmarkProblem, system_prompts: Mapping[str, str]) -> tuple[Message, ...]:
    """The conversation that the student continues; without a system turn if there is no prompt for the kind."""
    user = Message("user", problem.problem)
    if problem.kind not in system_prompts:
        return (user,)
    return (Message("system", system_prompts[problem.kind]), user)


def render_prompts(benchmarks: Sequence[Benchmark], chat: ChatFormat, system_prompts: str) -> StudentPrompts:
    """Renders every problem of every benchmark, in the form that the student saw in fine-tuning.

    Raises:
      EvaluationError: two benchmarks share a name, or the chat template cannot render a problem.
    """
    require_distinct([benchmark.name for benchmark in benchmarks])
    texts = load_system_prompts(system_prompts)
    prompts = tuple(
        Prompt(benchmark.name, problem.problem_id, index, _prompt_tokens(chat, benchmark, problem, texts))
        for benchmark in benchmarks
        for index, problem in enumerate(benchmark.problems)
    )
    open_thoughts = frozenset(
        (prompt.benchmark, prompt.problem_id) for prompt in prompts if opens_thought(chat, prompt.tokens)
    )
    return StudentPrompts(prompts, open_thoughts, chat.end_of_turn_id, chat.pad_id)


def _prompt_tokens(
    chat: ChatFormat, benchmark: Benchmark, problem: BenchmarkProblem, system_prompts: Mapping[str, str]
) -> tuple[int, ...]:
    messages = prompt_messages(problem, system_prompts)
    try:
        return tuple(render_prompt(chat, messages))
    except RenderRefusal as refusal:
        line = f"benchmark {benchmark.name}, problem {problem.problem_id}: {refusal}"
        if messages[0].role == "system" and _can_render(chat, messages[1:]):
            line += ", or ask without a system turn: evaluate.system_prompts=none"
        raise EvaluationError(line) from refusal


def _can_render(chat: ChatFormat, messages: Sequence[Message]) -> bool:
    try:
        render_prompt(chat, messages)
    except RenderRefusal:
        return False
    return True
