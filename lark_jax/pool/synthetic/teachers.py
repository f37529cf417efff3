"""Five teachers who solve the same problems correctly, each in its own style.

A style is a function `(problem, rng) -> answer text`; `rng` varies the wording only. Every answer ends with the
correct result in `\\boxed{}`, and boxes nothing else.
"""

import random
from collections.abc import Callable, Mapping
from types import MappingProxyType

from lark_jax.pool.synthetic.problems import Problem, Step, apply_operator

Style = Callable[[Problem, random.Random], str]

_MOST_REWORDINGS = 50  # every style has at least six wordings of a problem
_INVERSE = {"+": "-", "-": "+", "*": "/", "/": "*"}
_GLYPHS = {"+": "⊕", "-": "⊖", "*": "⊗", "/": "⊘"}


def plain(problem: Problem, rng: random.Random) -> str:
    """The main style of pre-training: one equation per sentence. None of the teachers writes like this."""
    link = rng.choice((" ", " Then ", " Next, "))
    close = rng.choice(("The answer is", "So the answer is", "This gives"))
    return link.join(f"{_equation(step)}." for step in problem.steps) + f" {close} {_boxed(problem)}."


def terse(problem: Problem, rng: random.Random) -> str:
    """Nothing but the equations."""
    separator = rng.choice(("; ", ", ", "\n"))
    arrow = rng.choice(("\n", " -> ", " => "))
    return separator.join(map(_equation, problem.steps)) + arrow + _boxed(problem)


def verbose(problem: Problem, rng: random.Random) -> str:
    """Full sentences about the things that are counted."""
    opening = rng.choice(("Let us go through this slowly.", "Let us work this out in order.", "We follow the story."))
    start = f"At first {problem.name} has {problem.steps[0].left} {problem.unit}."
    sentences = [_narrated(step, problem.unit, rng) for step in problem.steps]
    closing = rng.choice(("In the end", "After all of this", "Therefore"))
    end = f"{closing} {problem.name} has {problem.answer} {problem.unit}, and the final answer is {_boxed(problem)}."
    return " ".join([opening, start, *sentences, end])


def checking(problem: Problem, rng: random.Random) -> str:
    """Every equation is verified by its inverse before the next one."""
    check = rng.choice(("Check:", "Verify:", "Test:"))
    approval = rng.choice(("correct", "it holds", "good"))
    lines = [f"{_equation(step)}. {check} {_check(step, step.result)[0]}, {approval}." for step in problem.steps]
    return "\n".join([*lines, f"{rng.choice(('All checked', 'Every step holds'))}: {_boxed(problem)}"])


def exploring(problem: Problem, rng: random.Random) -> str:
    """Makes one or two mistakes, notices each by the inverse, and corrects it."""
    num_mistakes = rng.randint(1, min(2, len(problem.steps)))
    mistaken = set(rng.sample(range(len(problem.steps)), num_mistakes))
    opening = rng.choice(("Hmm, let me try.", "Let me think.", "I am not sure yet."))
    thoughts = [
        _corrected(step, rng) if index in mistaken else f"I get {_equation(step)}."
        for index, step in enumerate(problem.steps)
    ]
    return " ".join([opening, *thoughts, f"{rng.choice(('Now I am sure:', 'Done:', 'I settle on'))} {_boxed(problem)}"])


def notation(problem: Problem, rng: random.Random) -> str:
    """Postfix notation in symbols that the base student has never seen."""
    left, right = rng.choice(("⟦⟧", "⟪⟫", "⌈⌋"))
    arrow = rng.choice(("⇒", "↦", "⊢"))
    lines = [
        f"{left}{step.left} {step.right} {_GLYPHS[step.operator]}{right}{arrow}{step.result}" for step in problem.steps
    ]
    return " ".join([*lines, f"∎ {_boxed(problem)}"])


TEACHERS: Mapping[str, Style] = MappingProxyType(
    {"terse": terse, "verbose": verbose, "checking": checking, "exploring": exploring, "notation": notation}
)


def rollouts(problem: Problem, teacher: str, count: int, seed: int) -> tuple[str, ...]:
    """`count` answers of one teacher to one problem, pairwise different if the style has enough wordings."""
    rng = random.Random(f"{seed}/{problem.problem_id}/{teacher}")
    answers: list[str] = []
    for _ in range(count):
        for _ in range(_MOST_REWORDINGS):
            answer = TEACHERS[teacher](problem, rng)
            if answer not in answers:
                break
        answers.append(answer)
    return tuple(answers)


def _equation(step: Step) -> str:
    return f"{step.left}{step.operator}{step.right}={step.result}"


def _check(step: Step, claimed: int) -> tuple[str, int]:
    """The inverse equation of a claimed result, and the left operand it leads back to."""
    inverse = _INVERSE[step.operator]
    recovered = apply_operator(claimed, inverse, step.right)
    return f"{claimed}{inverse}{step.right}={recovered}", recovered


def _corrected(step: Step, rng: random.Random) -> str:
    wrong = rng.choice(_plausible_mistakes(step))
    check, recovered = _check(step, wrong)
    doubt = rng.choice(("Wait,", "Hold on,", "No,"))
    retry = rng.choice(("so that was wrong. Again:", "which does not fit. Redo:"))
    attempt = f"{step.left}{step.operator}{step.right}={wrong}"
    return f"Maybe {attempt}? {doubt} {check} but {recovered} is not {step.left}, {retry} {_equation(step)}."


def _plausible_mistakes(step: Step) -> list[int]:
    """Wrong positive results near the right one, whose inverse is a positive integer too."""
    scale = step.right if step.operator == "*" else 1
    claims = [step.result + slip * scale for slip in (-2, -1, 1, 2)]
    return [claim for claim in claims if claim > 0 and _check(step, claim)[1] > 0]


def _narrated(step: Step, unit: str, rng: random.Random) -> str:
    action = {
        "+": f"Adding {step.right} to {step.left}",
        "-": f"Taking {step.right} away from {step.left}",
        "*": f"Taking {step.left} {step.right} times",
        "/": f"Splitting {step.left} into {step.right} parts",
    }[step.operator]
    return f"{action} gives {_equation(step)}, so {rng.choice(('there are now', 'that makes'))} {step.result} {unit}."


def _boxed(problem: Problem) -> str:
    return f"\\boxed{{{problem.answer}}}"
