"""What counts as a judge's answer; everything else is refused."""

import json

import pytest

from lark_jax.judging.judgement import UnusableAnswer, answer_schema, read_judgement

CRITERIA = ("accuracy", "rigor")


def answer(**changes):
    criteria = {"accuracy": {"reason": "true", "score": 0.9}, "rigor": {"reason": "gaps", "score": 0}}
    return {"criteria": criteria, "overall_reason": "It holds.", "overall_score": 0.7, **changes}


def with_score(value):
    """The answer's text with this value as a criterion's score."""
    return json.dumps(answer()).replace("0.9", value)


@pytest.mark.parametrize("text", [json.dumps(answer()), f"\n {json.dumps(answer(), indent=2)}\n\n"])
def test_a_whole_answer_is_read(text):
    judgement = read_judgement(text, CRITERIA)
    assert (judgement.overall_score, judgement.overall_reason) == (0.7, "It holds.")
    assert judgement.scores == {"accuracy": 0.9, "rigor": 0.0}
    assert all(type(score) is float for score in judgement.scores.values())


@pytest.mark.parametrize(("value", "expected"), [("0", 0.0), ("1", 1.0), ("1.0", 1.0), ("1e-3", 0.001), ("-0.0", 0.0)])
def test_scores_from_0_to_1_are_accepted(value, expected):
    assert str(read_judgement(with_score(value), CRITERIA).scores["accuracy"]) == str(expected)


BAD = {
    "empty": ("", "not one JSON object"),
    "prose": ("The solution deserves 0.7.", "not one JSON object"),
    "a code fence": (f"```json\n{json.dumps(answer())}\n```", "not one JSON object"),
    "text after it": (json.dumps(answer()) + " Done.", "not one JSON object"),
    "two objects": (json.dumps(answer()) * 2, "not one JSON object"),
    "cut short": (json.dumps(answer())[:-5], "not one JSON object"),
    "single quotes": (str(answer()), "not one JSON object"),
    "a list": (json.dumps([answer()]), "the answer is not an object"),
    "a number": ("0.7", "the answer is not an object but 0.7"),
    "null": ("null", "the answer is not an object but None"),
    "NaN": (with_score("NaN"), "NaN is not a number"),
    "minus infinity": (with_score("-Infinity"), "-Infinity is not a number"),
    "infinity in disguise": (with_score("1e999"), r"criteria.accuracy.score is not a number from 0 to 1 but inf"),
    "true": (with_score("true"), "criteria.accuracy.score is not a number from 0 to 1 but True"),
    "a score in quotes": (with_score('"0.9"'), "criteria.accuracy.score is not a number"),
    "no score": (with_score("null"), "criteria.accuracy.score is not a number"),
    "above 1": (with_score("1.0000001"), "criteria.accuracy.score is not a number"),
    "of 10": (with_score("9"), "from 0 to 1 but 9"),
    "below 0": (with_score("-0.1"), "criteria.accuracy.score is not a number"),
    "overall true": (json.dumps(answer(overall_score=True)), "overall_score is not a number from 0 to 1 but True"),
    "a number of 5,000 digits": (with_score("9" * 5_000), "not one JSON object"),
    "endless nesting": ("[" * 100_000, "nested too deeply"),
    "a flood": (" " * 200_001, "200,001 characters"),
    "a key missing": (json.dumps({"criteria": {}, "overall_score": 1}), "the answer has no key 'overall_reason'"),
    "a key more": (json.dumps(answer(mood="good")), "the answer has the unknown key 'mood'"),
    "a key twice": (json.dumps(answer())[:-1] + ', "overall_score": 1.0}', "a key occurs twice"),
    "a criterion missing": (json.dumps(answer(criteria={})), "criteria has no key 'accuracy'"),
    "a criterion more": (
        json.dumps(answer(criteria={**answer()["criteria"], "style": {"reason": "", "score": 1}})),
        "criteria has the unknown key 'style'",
    ),
    "a bare score": (json.dumps(answer(criteria={"accuracy": 0.9, "rigor": 0.1})), "criteria.accuracy is not an obj"),
    "no reason in words": (json.dumps(answer(overall_reason=7)), "overall_reason is not a text but 7"),
    "an empty reason": (json.dumps(answer(overall_reason=" ")), "overall_reason is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_everything_else_is_refused_with_a_short_reason(name):
    text, reason = BAD[name]
    with pytest.raises(UnusableAnswer, match=reason) as caught:
        read_judgement(text, CRITERIA)
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


def test_the_schema_asks_for_exactly_what_is_read():
    schema = answer_schema(CRITERIA)

    def example(part):
        if part["type"] == "object":
            assert part["additionalProperties"] is False
            assert part["required"] == list(part["properties"])
            return {name: example(inner) for name, inner in part["properties"].items()}
        return "because" if part["type"] == "string" else part["maximum"]

    assert read_judgement(json.dumps(example(schema)), CRITERIA).overall_score == 1.0
