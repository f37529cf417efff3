import random
import re

import pytest

from lark_jax.evaluation.benchmark_records import Benchmark, BenchmarkProblem
from lark_jax.evaluation.benchmarks import read_benchmark
from lark_jax.evaluation.contamination import (
    AuditRow,
    Frame,
    audit_benchmarks,
    pool_problems,
    shared_frame,
)
from lark_jax.pool import read_pool
from lark_jax.pool.records import Message, Trajectory

INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def benchmark(name, *texts, levels=None):
    levels = levels or [None] * len(texts)
    problems = (
        BenchmarkProblem(f"{name}{index}", text, "1", "number", level)
        for index, (text, level) in enumerate(zip(texts, levels, strict=True))
    )
    return Benchmark(name, tuple(problems), "fingerprint")


def with_other_numerals(text, rng):
    """Every numeral replaced by another of the same number of digits."""

    def other(match):
        digits = list(match[0])
        digits[-1] = rng.choice([digit for digit in "23456789" if digit != digits[-1]])
        return "".join(digits)

    return re.sub(r"\d+", other, text)


@pytest.fixture(scope="module")
def math_l5(shared_data):
    return pool_problems(read_pool(shared_data / "pool" / "math_l5.jsonl").by_problem())


@pytest.fixture(scope="module")
def math500(shared_data):
    return read_benchmark(shared_data / "benchmarks" / "math500.jsonl")


def test_math_l5_against_math_500_finds_the_problems_in_both(math_l5, math500):
    """Both were drawn from the same test set; comparing the texts themselves finds 52 that they share."""
    audit = audit_benchmarks([math500], math_l5)
    identical = {problem.problem_id for problem in math500.problems if problem.problem in math_l5.values()}
    assert len(identical) == 52
    assert {overlap.problem_id for overlap in audit.overlaps if overlap.jaccard == 1.0} == identical
    assert [row.group for row in audit.rows] == [f"math500-L{level}" for level in range(1, 6)]
    assert [row.num_problems for row in audit.rows] == [43, 90, 105, 128, 134]  # as in the paper's Table 2
    assert audit.total == AuditRow("Total", 500, 52, (57, 52, 52))
    assert audit.frame == Frame()


def test_planted_copies_are_found_among_real_problems(math_l5, math500):
    """A verbatim copy, up to case and spacing, has an index of 1; one with other numerals is in [0.7, 0.95]."""
    rng = random.Random()
    numerals = {text: len(re.findall(r"\d+", text)) for text in math_l5.values()}
    texts = [text for text, count in numerals.items() if count >= 2 and 70 <= len(text) / count <= 150]
    copied, varied = rng.sample(texts, 2)
    planted = benchmark("planted", copied.upper().replace(" ", "  \\, ", 1) + "\n", with_other_numerals(varied, rng))
    verbatim, changed = audit_benchmarks([math500, planted], math_l5).overlaps[-2:]
    assert verbatim.jaccard == 1.0
    assert verbatim.pool_problem == copied
    assert 0.7 <= changed.jaccard <= 0.95
    assert changed.pool_problem == varied


def test_rows_count_problems_at_every_threshold():
    text = "the quick brown fox jumps over the lazy dog"  # 36 grams, all different
    tails = ["", "!", "!" * 7, "!?" * 8, "abcdefgh" * 8]  # 0, 1, 7 (6 of them new), 9 and 15 additional grams
    texts = [text + tail for tail in tails]
    sets = [{entry[start : start + 8] for start in range(len(entry) - 7)} for entry in texts]
    expected = [len(sets[0] & other) / len(sets[0] | other) for other in sets]
    audit = audit_benchmarks([benchmark("b", *texts), benchmark("c", "nothing of the kind")], {"p": text})
    assert [overlap.jaccard for overlap in audit.overlaps[:-1]] == expected
    thresholds = tuple(sum(value >= least for value in expected) for least in (0.4, 0.7, 0.85))
    assert audit.rows == (AuditRow("b", 5, 1, thresholds), AuditRow("c", 1, 0, (0, 0, 0)))
    assert audit.total == AuditRow("Total", 6, 1, thresholds)
    assert len(set(thresholds)) > 1


def test_the_nearest_problem_is_named_and_near_ones_are_counted():
    pool = {
        "far": "an entirely different text",
        "near": "what is the sum of 1 and 2?",
        "same": "what is the sum of 1 and 3?",
    }
    (overlap,) = audit_benchmarks([benchmark("b", "What is the sum of 1 and 3?")], pool).overlaps
    assert (overlap.pool_id, overlap.jaccard, overlap.num_near) == ("same", 1.0, 2)


def test_a_benchmark_is_split_by_level_only_where_every_problem_has_one():
    split = benchmark("m", "first text", "second text", "third text", levels=["5", "2", "5"])
    whole = benchmark("n", "fourth text", "fifth text", levels=["1", None])
    audit = audit_benchmarks([split, whole], {"p": "some text"})
    assert [(row.group, row.num_problems) for row in audit.rows] == [("m-L2", 1), ("m-L5", 2), ("n", 2)]


def test_an_instruction_in_every_pool_problem_is_ignored():
    rng = random.Random()
    bare = ["".join(rng.choices(LETTERS + " ", k=60)) + mark for mark in ".?" * 15]
    pool = {str(index): f"Solve the following problem: {text}{INSTRUCTION}" for index, text in enumerate(bare)}
    with_instruction = pool["4"]
    audit = audit_benchmarks([benchmark("b", bare[7], with_instruction)], pool)
    assert audit.frame == Frame("Solve the following problem: ", INSTRUCTION)
    assert [(overlap.pool_id, overlap.jaccard) for overlap in audit.overlaps] == [("7", 1.0), ("4", 1.0)]


@pytest.mark.parametrize(
    ("texts", "frame"),
    [
        ([f"{index} things{INSTRUCTION}" for index in range(19)], Frame()),  # too few to tell
        ([f"{letter} ends" for letter in LETTERS], Frame()),  # too short to be an instruction
        ([f"{letter}nswer{INSTRUCTION}" for letter in LETTERS], Frame("", INSTRUCTION)),  # no part of a word
        ([f"Compute the digits of 1{letter}" for letter in LETTERS], Frame("Compute the digits of ")),
        (["the same text over and over"] * 40, Frame()),
    ],
)
def test_a_frame_is_whole_words_of_many_problems(texts, frame):
    assert shared_frame(texts) == frame


def test_problems_of_a_pool_are_the_user_turns():
    messages = (Message("system", "Reason."), Message("user", "2+2?"), Message("assistant", "4"))
    trajectories = [Trajectory("p", str(index), "t", messages, "here") for index in range(2)]
    assert pool_problems({"p": trajectories}) == {"p": "2+2?"}
