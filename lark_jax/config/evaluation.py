"""The configuration section `evaluate`."""

import dataclasses

from lark_jax.config.fields import (
    NON_NEGATIVE,
    POSITIVE,
    SOME_DISTINCT,
    VARIABLE,
    Check,
    Section,
    at_least,
    field,
    one_of,
)

STUDENT_PLACEHOLDER = "{student}"  # in evaluate.server_model


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(Section, name="evaluate"):
    """Acc@k of the base student and of every fine-tuned one."""

    engine: str = field(
        "auto",
        'What generates: "vllm", "transformers", "openai" (a server), or "auto": vLLM if it works, else transformers.',
        check=one_of("auto", "vllm", "transformers", "openai"),
    )
    python: str | None = field(
        None, "Python interpreter of the engine's own virtualenv; None: this process's.", path=True
    )
    benchmarks: tuple[str, ...] = field(
        (), "Names on the Hugging Face hub (aime24, math500, ...), FILE, NAME=FILE or NAME=owner/dataset.", path=True
    )
    system_prompts: str = field(
        "by_kind",
        'System prompts by kind of answer: "by_kind" (built in), "none", or a JSON file {kind: text}.',
        paper='C.4 "System prompts", in our wording',
        path=True,
    )
    include_base: bool = field(True, "Evaluate the student before fine-tuning too.", paper="Table 1, BaseModel")
    samples: int = field(
        5, "Samples per problem and seed: the k of Acc@k.", unit="samples", paper="C.4, Acc@5", check=at_least(1)
    )
    seeds: tuple[int, ...] = field(
        (0, 1, 2),
        "Decoding seeds.",
        paper="C.4: three decoding seeds",
        check=SOME_DISTINCT,
        items=at_least(0),
    )
    temperature: float = field(0.6, "Sampling temperature.", paper="C.4", check=NON_NEGATIVE)
    top_p: float = field(
        0.95, "Nucleus sampling.", paper="C.4", check=Check("a number in (0, 1]", lambda value: 0 < value <= 1)
    )
    repetition_penalty: float = field(
        1.0, "Repetition penalty, as vLLM defines it.", paper="1.1 in C.3, none in C.4", check=POSITIVE
    )
    max_tokens: int = field(32_768, "Limit for a sample.", unit="tokens", paper="C.4", check=at_least(1))
    grader: str = field(
        "math_verify",
        'Grading rules: those of "math_verify", or "paper", the plain ones of C.4.',
        paper="C.4",
        check=one_of("math_verify", "paper"),
    )
    tensor_parallel: int = field(1, "GPUs per engine.", unit="GPUs", paper="C.3: one GPU per shard", check=at_least(1))
    engines: int | None = field(
        None,
        "Engines that share the problems; None: as many as there are GPUs for.",
        unit="engines",
        check=at_least(1),
    )
    server: str | None = field(
        None, 'Engine "openai": base URL of a server that takes prompts as token ids, http://HOST:PORT/v1.'
    )
    server_model: str | None = field(
        None, f'The student\'s name on the server; "{STUDENT_PLACEHOLDER}" in it becomes base, lark_B3, ...'
    )
    server_key_variable: str | None = field(None, "Environment variable that holds the server's key.", check=VARIABLE)
    server_concurrency: int = field(64, "Requests in flight.", unit="requests", check=at_least(1))
    server_timeout: float = field(3_600.0, "Limit for one sample.", unit="seconds", check=POSITIVE)
    server_retries: int = field(5, "Retries of a sample after transient failures.", unit="retries", check=at_least(0))

    def check(self) -> None:
        greedy = self.temperature == 0
        self.require(not greedy or self.samples == 1, "samples", "1 with temperature 0 (all samples would be equal)")
        if self.engine == "openai":
            self.require_url("server")
            self.require(bool(self.server_model), "server_model", "a model's name")
