"""The configuration sections `student`, `pool` and `synthetic`: what an experiment starts from."""

import dataclasses
from typing import Any

from lark_jax.config.fields import POSITIVE, Check, Section, at_least, field, one_of, required


@dataclasses.dataclass(frozen=True)
class StudentConfig(Section, name="student"):
    """The model that is asked, fine-tuned and evaluated."""

    path: str = required("Folder with config.json, *.safetensors and tokenizer files, or a hub id.", path=True)
    chat_template: str | None = field(None, "Jinja file that replaces the tokenizer's own chat template.", path=True)
    max_length: int = field(
        32_768,
        "Limit for prompt and answer together, in every stage; longer trajectories lose their end.",
        unit="tokens",
        paper='C.3 "Maximum sequence length"',
        check=at_least(2),
    )


@dataclasses.dataclass(frozen=True)
class ColumnsConfig(Section, name="pool.columns"):
    """The column of the source that each field of a record is read from; None: the one with the field's own name."""

    problem_id: str | None = field(None, "Column with the problem's id.")
    candidate_id: str | None = field(None, "Column with the candidate's id, unique within its problem.")
    teacher: str | None = field(None, "Column with the teacher's name.")
    messages: str | None = field(None, "Column with messages: {role, content}, or ShareGPT's {from, value}.")
    prompt: str | None = field(None, "Column with the prompt's text; prompt and response together replace messages.")
    response: str | None = field(None, "Column with the response's text.")
    system: str | None = field(None, "Column with the text of a system turn.")
    answer: str | None = field(None, "Column with the reference answer.")
    correct: str | None = field(None, "Column that tells whether the trajectory's answer is correct.")

    def check(self) -> None:
        both = self.messages is not None and (self.prompt is not None or self.response is not None)
        self.require(not both, "messages", "either messages, or prompt and response")

    def given(self) -> dict[str, str]:
        """Field -> column, for the fields that are mapped."""
        return {name: column for name, column in dataclasses.asdict(self).items() if column is not None}


@dataclasses.dataclass(frozen=True)
class PoolConfig(Section, name="pool"):
    """The candidate trajectories."""

    path: str = required(
        "File (.jsonl, .json, .parquet, .arrow), folder of such files, or the hub id of a dataset.",
        paper="C.1: 5,000 problems x 33 trajectories of 11 teachers",
        path=True,
    )
    on_bad_record: str = field(
        "error",
        'A record that cannot be used: "error" stops there; "skip" lists it in the manifest and goes on.',
        check=one_of("error", "skip"),
    )
    columns: ColumnsConfig = dataclasses.field(default=ColumnsConfig())
    only_correct: bool = field(
        False, "Leave out records whose `correct` is false.", paper="C.1: the pool has only correct ones"
    )
    duplicate_answers: str = field(
        "keep",
        'The same answer twice in a problem: "keep" and report it, "skip" it, or "error".',
        check=one_of("keep", "skip", "error"),
    )
    teacher: str | None = field(None, "Teacher of the records that name none.")
    split: str | None = field(None, 'Split of a dataset that has several, such as "train".')
    file_names: str | None = field(
        None,
        'How the files of a folder of .json lists are named, such as "{teacher}_{rollout}.json".',
        check=Check('a pattern like "{teacher}/{rollout}.json"', lambda value: value.count("{teacher}") == 1),
    )
    exclude: tuple[str, ...] = field(
        ("selected_by_rsr/*",),
        "Patterns of files in a folder that are not part of the pool.",
        paper="C.1: the published pool has this folder next to its 33 files",
    )

    def reading(self) -> dict[str, Any]:
        """Everything but the path: what decides which records the source gives."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "path"}


@dataclasses.dataclass(frozen=True)
class SyntheticConfig(Section, name="synthetic"):
    """The embedded experiment (stage "prepare"): problems, the teachers' pool, a tokenizer and a small student."""

    num_problems: int = field(200, "Size of the pool.", unit="problems", check=at_least(1))
    num_test_problems: int = field(100, "Size of the benchmark, held out.", unit="problems", check=at_least(1))
    rollouts: int = field(3, "Trajectories per teacher and problem.", unit="trajectories", check=at_least(1))
    num_pretrain_problems: int = field(
        12_000,
        "Problems that only the base student sees, disjoint from the other two sets.",
        unit="problems",
        check=at_least(1),
    )
    pretrain_epochs: int = field(1, "Passes over the pre-training problems.", unit="epochs", check=at_least(1))
    pretrain_batch_size: int = field(
        16,
        "Batch size of pre-training; copying numbers takes a few hundred steps to appear.",
        unit="trajectories",
        check=at_least(1),
    )
    pretrain_learning_rate: float = field(6e-3, "Peak learning rate of pre-training.", check=POSITIVE)
    hidden_size: int = field(64, "Width of the student.", check=at_least(1))
    num_layers: int = field(2, "Depth of the student.", unit="layers", check=at_least(1))
    num_heads: int = field(
        2, "Query heads; the evaluation engine needs hidden_size / num_heads >= 32.", unit="heads", check=at_least(1)
    )
    num_kv_heads: int = field(1, "Key and value heads.", unit="heads", check=at_least(1))
    intermediate_size: int = field(256, "Width of the student's MLPs.", check=at_least(1))

    def check(self) -> None:
        divides = self.hidden_size % self.num_heads == 0 and self.num_heads % self.num_kv_heads == 0
        self.require(divides, "num_heads", "a divisor of hidden_size and a multiple of num_kv_heads")
