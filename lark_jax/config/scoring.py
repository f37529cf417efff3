"""The configuration sections `score`, `score.judge` and `select`."""

import dataclasses
import json
import re

from lark_jax.config.fields import (
    DISTINCT,
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

DTYPES = ("float32", "bfloat16")
ATTENTION_BACKENDS = ("dense", "blockwise", "cudnn", "triton", "splash")  # keys of students.attention.dispatch.BACKENDS
SCORE_METRICS = ("judge", "local_naturalness", "rule_quality")  # keys of stages.metrics.METRICS


def _names_an_end(rule: str) -> bool:
    try:
        return "end" in re.compile(rule).groupindex
    except re.error:
        return False


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


@dataclasses.dataclass(frozen=True)
class JudgeConfig(Section, name="score.judge"):
    """The language model that grades trajectories for the metric "judge" (C.2 "LLM-judged Quality")."""

    engine: str = field(
        "openai",
        'Who answers: "openai", a server with chat completions, or "vllm", a folder, run in evaluate.python.',
        check=one_of("openai", "vllm"),
    )
    model: str | None = field(None, "The judge's name on the server, or its folder.", paper="C.2: Qwen3-32B", path=True)
    server: str | None = field(None, "Base URL, http://HOST:PORT/v1.")
    key_variable: str | None = field(None, "Environment variable that holds the server's key.", check=VARIABLE)
    prompt_file: str | None = field(
        None, "TOML file with another rubric.", paper="default: our wording of the rubric of C.2", path=True
    )
    max_tokens: int = field(1_024, "Limit for an answer.", unit="tokens", paper="not given; ours", check=at_least(1))
    temperature: float = field(0.0, "Sampling temperature.", paper="not given; ours", check=NON_NEGATIVE)
    structured_output: str = field(
        "schema",
        'How the judge is held to JSON: by the answer\'s "schema", as any "json_object", or "none".',
        check=one_of("schema", "json_object", "none"),
    )
    template_arguments: str = field(
        "{}",
        "JSON object with arguments of the judge's chat template.",
        paper='C.2, non-thinking mode of Qwen3: {"enable_thinking": false}',
        check=Check("a JSON object", _is_json_object),
    )
    attempts: int = field(3, "Answers asked for until one can be used.", unit="answers", check=at_least(1))
    concurrency: int = field(32, "Requests in flight.", unit="requests", check=at_least(1))
    requests_per_minute: float | None = field(
        None, "Rate limit; None: as many as concurrency allows.", unit="requests/min", check=POSITIVE
    )
    timeout: float = field(600.0, "Limit for one request.", unit="seconds", check=POSITIVE)
    retries: int = field(5, "Retries of a request after transient failures.", unit="retries", check=at_least(0))
    tensor_parallel: int = field(1, 'GPUs of the engine "vllm".', unit="GPUs", check=at_least(1))

    def require_usable(self) -> None:
        """Called where the judge is asked for."""
        self.require(bool(self.model), "model", "a model's name or folder")
        if self.engine == "openai":
            self.require_url("server")


@dataclasses.dataclass(frozen=True)
class ScoreConfig(Section, name="score"):
    """One forward pass per trajectory, and the additional metrics."""

    tokens_per_batch: int = field(
        32_768, "Limit per device and step, padding included.", unit="tokens", check=at_least(1)
    )
    dtype: str = field(
        "bfloat16",
        "Type of parameters and activations; statistics are always float32.",
        paper='C.3 "Precision"',
        check=one_of(*DTYPES),
    )
    metrics: tuple[str, ...] = field(
        (),
        "Additional columns of the score table, for the methods that need them; adding one computes only that one.",
        check=DISTINCT,
        items=one_of(*SCORE_METRICS),
    )
    vocab_chunk: int = field(
        4_096,
        "Vocabulary rows per pass, the widest logits that ever exist; affects memory, not results.",
        unit="rows",
        check=at_least(1),
    )
    attention: str = field(
        "auto",
        'Attention kernel; "auto" chooses by platform and row length.',
        paper="C.3: FlashAttention-2",
        check=one_of("auto", *ATTENTION_BACKENDS),
    )
    parameters: str = field(
        "auto",
        'The student\'s parameters: "replicated", "gathered" layer by layer, or "auto": replicated where they fit.',
        check=one_of("auto", "replicated", "gathered"),
    )
    natural_context: int = field(
        4,
        "Preceding steps that a step sees in Local Naturalness.",
        unit="steps",
        paper="C.2, m",
        check=at_least(0),
    )
    natural_split: str | None = field(
        None,
        "Regular expression for the steps of Local Naturalness, see scoring.local_naturalness.steps; None: our rule.",
        paper='C.2: "sentence-level"',
        check=Check(
            "a regular expression with a group named end, which marks where a step ends: (?P<end>...)", _names_an_end
        ),
    )
    judge: JudgeConfig = dataclasses.field(default=JudgeConfig())

    def check(self) -> None:
        if "judge" in self.metrics:
            self.judge.require_usable()


@dataclasses.dataclass(frozen=True)
class SelectConfig(Section, name="select"):
    """Selection methods and budgets; every method is combined with every budget."""

    methods: tuple[str, ...] = field(("lark",), "Names of selection methods, see docs/methods.md.", check=DISTINCT)
    budgets: tuple[int, ...] = field(
        (3,), "B, trajectories kept per problem.", unit="trajectories", check=SOME_DISTINCT, items=at_least(1)
    )
    score: str | None = field(
        None, 'With weighting: one more method, named "<score>-<weighting>", such as g_hat-uniform.'
    )
    weighting: str | None = field(None, "With score: how its scores become weights.")
    temperature: float = field(
        1.0,
        "Of the weightings softmax (in units of the score) and kl (a multiple of Lemma 3's tau).",
        paper="not given",
        check=POSITIVE,
    )
    resample: int = field(
        0,
        "Copies per problem in train_resampled.jsonl, for trainers without weights; 0: no such file.",
        unit="copies",
        check=at_least(0),
    )

    def check(self) -> None:
        self.require(len(self.methods) > 0 or self.score is not None, "methods", "one or more, or a score")
        both_or_none = (self.score is None) == (self.weighting is None)
        self.require(both_or_none, "weighting", "score and weighting given together")
