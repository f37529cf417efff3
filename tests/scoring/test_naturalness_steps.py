"""Sentence-level steps: where they end, and which tokens belong to them."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from lark_jax.pool import read_pool
from lark_jax.rendering.chat import RenderedTrajectory, load_chat_format, render_trajectories, target_offsets
from lark_jax.scoring.local_naturalness.steps import compile_split, step_starts, steps_of_tokens

SENTENCES = compile_split(None)


def steps(text: str, rule: str | None = None) -> list[str]:
    starts = step_starts(text, compile_split(rule))
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


@pytest.mark.parametrize(
    "expected",
    [
        ["So x is 3.14. ", "Hence y = 2.5!\n\n", "Right? ", "Yes"],
        ["We use e.g. Eq. (3) or cf. Fig. 2 here. ", "Then stop."],
        ["The answer is no. ", "See no. 5 of them. ", "Done."],
        ["1. First, add.\n", "2. Then divide by 3. ", "It works.\n", "10. Last one."],
        ["Two ways.\n", "  1. Add. ", "See.\n\n", "\t2. Divide"],
        ["### Step 1: Start\n", "Here **we go.** ", 'He said "stop." ', "(All of it.) ", "End"],
        ["Code:\n", "```python\nx = 1. \nprint(x)\n```\n", "After. ", "That"],
        ["```\nnever closed. still\nthe same"],
        ["It is\n", "\\[ a = b.\n c = d \\]\n", "and $$ x.\n y $$ too. ", "Good."],
        ["So $x = 5.$ ", "Then \\(y = 6.\\) ", "Is it $7?$\n", "**It is $8.$** ", "There are $5!$ ways. ", "End"],
        ["A row \\begin{aligned} a &= b, \\\\[4pt] c &= d \\end{aligned}. ", "Then [x] \\] here. ", "Done"],
        ["Given.$$ x = 1. So\n y $$ it. ", "It costs $5.00 or $6."],
        ["Wait... ", "What?! ", "f.g and 1.2.3 stay."],
        ["我们有。", "然后呢？", "好"],
        ["One.\r\n", "Two.\r\n\r\n", "Three"],
        ["no break at all"],
        ["."],
        [" \n "],
    ],
    ids=lambda expected: expected[0][:12],
)
def test_sentences_end_where_a_reader_would_end_them(expected: list[str]) -> None:
    assert steps("".join(expected)) == expected


def test_pieces_without_letters_or_digits_join_the_step_before_them() -> None:
    assert steps("---\nOne.\n***\n}\nTwo.\n---") == ["---\nOne.\n***\n}\n", "Two.\n---"]


def test_another_rule_replaces_ours() -> None:
    assert steps("a; b; c. d\ne", r"(?P<end>;\s*)") == ["a; ", "b; ", "c. d\ne"]
    assert steps("a;b [x;y] c;d", r"\[.*?\]|(?P<end>;)") == ["a;", "b [x;y] c;", "d"]


@pytest.mark.parametrize(("rule", "message"), [("(", "not a regular expression"), (r"\n", "no group named `end`")])
def test_a_rule_without_ends_is_refused(rule: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_split(rule)


@given(st.text("ab1. \n?!*`\\[]$e.g", max_size=60))
@example("")
def test_steps_add_up_to_the_text_and_each_has_a_letter_or_digit(text: str) -> None:
    found = steps(text)
    assert "".join(found) == text
    if re.search(r"\w", text):
        assert all(re.search(r"\w", step) for step in found)
    else:
        assert found == [text]


def test_tokens_go_to_the_step_of_their_last_character() -> None:
    #        0123456789
    # text: "Hi. Yes.\n" with a lead before it, an end of turn after it, and " Yes" as one token.
    starts = step_starts("Hi. Yes.\n", SENTENCES)
    assert starts == (0, 4)
    offsets = [(-1, 0), (0, 2), (2, 3), (3, 7), (7, 9), (9, 19)]
    np.testing.assert_array_equal(steps_of_tokens(offsets, starts), [0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize("text", ["One. 2 is.  \n\n 3!\n\tIt is. ", 'He said "two."   Then\n\n\n  he left.\n'])
def test_a_tokenizer_that_trims_white_space_gives_the_same_steps(text: str) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["One. 2 is"], trainer)
    found = []
    for trims in (False, True):
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trims)
        offsets = tokenizer.encode_batch([text], add_special_tokens=False)[0].offsets
        assert any(start == end for start, end in offsets) == trims
        found.append(steps_of_tokens(offsets, step_starts(text, SENTENCES)).tolist())
    assert found[0] == found[1]
    assert found[0][-1] + 1 == len(steps(text))


def test_a_step_without_a_token_vanishes_and_numbers_stay_dense() -> None:
    # The token (0, 9) covers the first two steps and belongs to the second; bytes of one character share its place.
    np.testing.assert_array_equal(steps_of_tokens([(0, 9), (9, 10), (9, 10), (10, 12)], (0, 4, 10)), [0, 0, 0, 1])
    np.testing.assert_array_equal(steps_of_tokens([(0, 5), (2, 3), (5, 6)], (0, 4)), [0, 0, 0])


@pytest.mark.parametrize("tokenizer", ["Qwen2.5-base", "Qwen3", "minimind"])
def test_real_answers_keep_their_tokens_and_steps_keep_their_words(shared_data: Path, tokenizer: str) -> None:
    chat = load_chat_format(shared_data / "tokenizers" / tokenizer)
    rng = np.random.default_rng()
    pool = read_pool(shared_data / "pool" / "math_l5.jsonl")
    some = [pool.trajectories[index] for index in rng.integers(0, len(pool.trajectories), 40)]
    backend = chat.tokenizer.backend_tokenizer
    for trajectory, item in zip(some, render_trajectories(chat, some, 32_768), strict=True):
        if not isinstance(item, RenderedTrajectory):
            continue
        (offsets,) = target_offsets(chat, [trajectory.response])
        starts = step_starts(trajectory.response, SENTENCES)
        numbers = steps_of_tokens(offsets, starts)
        assert len(numbers) == len(item.target_tokens)
        ends = [*starts[1:], len(trajectory.response)]
        pieces = [trajectory.response[start:end] for start, end in zip(starts, ends, strict=True)]
        if numbers[-1] + 1 != len(pieces):
            continue  # a token that spans a whole step
        for number, piece in enumerate(pieces):
            decoded = backend.decode(item.target_tokens[numbers == number].tolist(), skip_special_tokens=True)
            # Only a space may change sides: the one that a token begins with.
            if "\ufffd" not in decoded:
                assert decoded.strip() == piece.strip()
