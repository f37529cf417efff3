"""An ml_collections file becomes one frozen, validated `Experiment`.

Every check happens here, before anything is read or compiled; a `ConfigError` names the field as it is written on
the command line (`finetune.batch_size`), the value found and the values allowed. Nothing in here imports JAX.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from lark_jax.config.checks import require as _require
from lark_jax.config.checks import require_one_of as _require_one_of
from lark_jax.config.checks import require_url as _require_url
from lark_jax.config.checks import require_variable as _require_variable
from lark_jax.config.judge import JudgeConfig
from lark_jax.config.values import converted, section_from_mapping

STAGES = ("prepare", "score", "select", "finetune", "export", "evaluate", "report")
DTYPES = ("float32", "bfloat16")
ATTENTION_BACKENDS = ("dense", "blockwise", "cudnn", "triton", "splash")  # keys of students.attention.dispatch.BACKENDS
SCORE_METRICS = ("judge", "local_naturalness", "rule_quality")  # keys of stages.metrics.METRICS
TRAINING_LOGGERS = ("tensorboard", "wandb")  # keys of finetuning.loggers.LOGGERS
REMAT_CHOICES = ("none", "attention", "block", "offload")  # keys of students.remat.POLICIES
STUDENT_PLACEHOLDER = "{student}"  # in evaluate.server_model
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of students.decoder


def _marks_ends(rule: str | None) -> bool:
    try:
        return rule is None or "end" in re.compile(rule).groupindex
    except re.error:
        return False


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    path: str  # folder with config.json, *.safetensors and tokenizer files, or a hub id
    chat_template: str | None = None  # Jinja file, for tokenizers that bring no template
    max_length: int = 32_768  # tokens of prompt and answer together; longer trajectories lose their end

    def __post_init__(self) -> None:
        _require(bool(self.path), "student.path", self.path, "a checkpoint folder or hub id")
        _require(self.max_length >= 2, "student.max_length", self.max_length, "an integer >= 2")


@dataclasses.dataclass(frozen=True)
class ColumnsConfig:
    """Which column of the source a field of a record is read from; None: the one with the field's own name."""

    problem_id: str | None = None
    candidate_id: str | None = None
    teacher: str | None = None
    messages: str | None = None  # {role, content} or ShareGPT's {from, value}
    prompt: str | None = None  # text; prompt and response together in place of messages
    response: str | None = None
    system: str | None = None  # text of a system turn
    answer: str | None = None
    correct: str | None = None

    def __post_init__(self) -> None:
        both = self.messages is not None and (self.prompt is not None or self.response is not None)
        _require(not both, "pool.columns.messages", self.messages, "either messages, or prompt and response")

    def given(self) -> dict[str, str]:
        """Field -> column, for the fields that are mapped."""
        return {name: column for name, column in dataclasses.asdict(self).items() if column is not None}


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    path: str  # .jsonl, .json, .parquet or .arrow file, a folder of such files, or the hub id of a dataset
    on_bad_record: str = "error"  # "error": stop at the first; "skip": go on, list it in the manifest
    columns: ColumnsConfig = ColumnsConfig()
    only_correct: bool = False  # leave out records whose `correct` is false
    duplicate_answers: str = "keep"  # same text twice in a problem: "keep" (and report), "skip", "error"
    teacher: str | None = None  # of records that name none
    split: str | None = None  # of a dataset with several: "train", ...
    file_names: str | None = None  # in a folder of .json lists, e.g. "{teacher}_{rollout}.json"
    exclude: tuple[str, ...] = ("selected_by_rsr/*",)  # files of a folder that are no part of the pool

    def __post_init__(self) -> None:
        _require(bool(self.path), "pool.path", self.path, "a file, a folder or a hub id")
        _require_one_of("pool.on_bad_record", self.on_bad_record, ("error", "skip"))
        _require_one_of("pool.duplicate_answers", self.duplicate_answers, ("keep", "skip", "error"))
        names_teacher = self.file_names is None or self.file_names.count("{teacher}") == 1
        _require(names_teacher, "pool.file_names", self.file_names, 'a pattern like "{teacher}/{rollout}.json"')

    def reading(self) -> dict[str, Any]:
        """Everything but the path: what decides which records the source gives."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "path"}


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    tokens_per_batch: int = 32_768  # tokens per device and step at most, padding included
    dtype: str = "bfloat16"  # of parameters and activations; statistics are always float32
    metrics: tuple[str, ...] = ()  # further columns of the score table, from SCORE_METRICS; an added one runs alone
    vocab_chunk: int = 4_096  # vocabulary rows per pass; the widest logits that ever exist
    attention: str = "auto"  # by platform and row length, or one of ATTENTION_BACKENDS
    parameters: str = "auto"  # of the student: "replicated", "gathered" layer by layer, or what fits
    natural_context: int = 4  # of "local_naturalness": steps that a step sees before it
    natural_split: str | None = None  # its steps: a regular expression, see scoring.local_naturalness.steps; None: ours
    judge: JudgeConfig = dataclasses.field(default_factory=JudgeConfig)  # of the metric "judge"

    def __post_init__(self) -> None:
        _require(self.tokens_per_batch >= 1, "score.tokens_per_batch", self.tokens_per_batch, "an integer >= 1")
        _require_one_of("score.dtype", self.dtype, DTYPES)
        for metric in self.metrics:
            _require_one_of("score.metrics", metric, SCORE_METRICS)
        _require(len(set(self.metrics)) == len(self.metrics), "score.metrics", self.metrics, "each at most once")
        if "judge" in self.metrics:
            self.judge.require_usable()
        _require(self.vocab_chunk >= 1, "score.vocab_chunk", self.vocab_chunk, "an integer >= 1")
        _require_one_of("score.attention", self.attention, ("auto", *ATTENTION_BACKENDS))
        _require_one_of("score.parameters", self.parameters, ("auto", "replicated", "gathered"))
        _require(self.natural_context >= 0, "score.natural_context", self.natural_context, "an integer >= 0")
        rule = "a regular expression with a group named end, which marks where a step ends: (?P<end>...)"
        _require(_marks_ends(self.natural_split), "score.natural_split", self.natural_split, rule)


@dataclasses.dataclass(frozen=True)
class SelectConfig:
    methods: tuple[str, ...] = ("lark",)  # keys of selection.methods.METHODS
    budgets: tuple[int, ...] = (3,)  # B, trajectories kept per problem
    score: str | None = None  # with `weighting`: one more method, "<score>-<weighting>"
    weighting: str | None = None
    temperature: float = 1.0  # softmax: in the units of the score; kl: a multiple of tau of Lemma 3
    resample: int = 0  # copies per problem in train_resampled.jsonl, for trainers without weights; 0: no such file

    def __post_init__(self) -> None:
        _require(len(self.methods) > 0 or self.score is not None, "select.methods", self.methods, "one or more")
        _require(len(set(self.methods)) == len(self.methods), "select.methods", self.methods, "distinct names")
        valid_budgets = len(self.budgets) > 0 and all(budget >= 1 for budget in self.budgets)
        _require(valid_budgets, "select.budgets", self.budgets, "one or more integers >= 1")
        _require(len(set(self.budgets)) == len(self.budgets), "select.budgets", self.budgets, "distinct integers")
        _require(self.resample >= 0, "select.resample", self.resample, "an integer >= 0")
        both_or_none = (self.score is None) == (self.weighting is None)
        _require(both_or_none, "select.weighting", self.weighting, "score and weighting given together")
        valid_temperature = 0 < self.temperature < math.inf
        _require(valid_temperature, "select.temperature", self.temperature, "a positive number")


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    learning_rate: float = 1e-5  # peak, after warm-up
    epochs: int = 5
    batch_size: int = 64  # trajectories per optimizer step, over all devices
    warmup_fraction: float = 0.05  # of all steps, linear; then cosine to zero
    max_grad_norm: float = 1.0  # global norm
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    dtype: str = "bfloat16"  # of the computation; parameters, moments and gradient sums stay float32
    tokens_per_batch: int = 32_768  # tokens per device and micro-batch, padding included
    packing: bool = False  # several trajectories in one row, kept apart by segment ids
    attention: str = "auto"  # by platform and row length, or one of ATTENTION_BACKENDS
    remat: str = "block"  # one of REMAT_CHOICES: what the backward pass keeps instead of computing it again
    vocab_chunk: int = 4_096  # vocabulary rows per pass of the loss
    checkpoint_every: int = 50  # optimizer steps
    keep_checkpoints: int = 2  # the newest ones; with a held-out set, the best one too
    held_out_fraction: float = 0.0  # of the problems: never trained on, their loss is measured
    evaluate_every: int = 50  # optimizer steps between two measurements of the held-out loss
    loggers: tuple[str, ...] = ()  # beside metrics.jsonl: "tensorboard", "wandb"
    lora_rank: int = 0  # of the adapter that is trained instead of the weights; 0: every parameter is trained
    lora_alpha: float = 16.0  # the adapter's part is multiplied by lora_alpha / lora_rank
    lora_targets: tuple[str, ...] = LORA_TARGETS  # linear layers with an adapter, by HF's names

    def __post_init__(self) -> None:
        for name in ("learning_rate", "max_grad_norm", "eps"):
            value = getattr(self, name)
            _require(0 < value < math.inf, f"finetune.{name}", value, "a positive number")
        counts = ("epochs", "batch_size", "tokens_per_batch", "vocab_chunk")
        for name in (*counts, "checkpoint_every", "keep_checkpoints", "evaluate_every"):
            _require(getattr(self, name) >= 1, f"finetune.{name}", getattr(self, name), "an integer >= 1")
        for name in ("b1", "b2", "warmup_fraction", "held_out_fraction"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"finetune.{name}", value, "a number in [0, 1)")
        valid_decay = 0 <= self.weight_decay < math.inf
        _require(valid_decay, "finetune.weight_decay", self.weight_decay, "a number >= 0")
        _require_one_of("finetune.dtype", self.dtype, DTYPES)
        _require_one_of("finetune.remat", self.remat, REMAT_CHOICES)
        _require_one_of("finetune.attention", self.attention, ("auto", *ATTENTION_BACKENDS))
        honoured = not self.packing or self.attention != "cudnn"
        _require(
            honoured, "finetune.attention", self.attention, "a backend that honours the segment ids of packed rows"
        )
        for logger in self.loggers:
            _require_one_of("finetune.loggers", logger, TRAINING_LOGGERS)
        _require(len(set(self.loggers)) == len(self.loggers), "finetune.loggers", self.loggers, "each at most once")
        self._check_lora()

    def _check_lora(self) -> None:
        _require(self.lora_rank >= 0, "finetune.lora_rank", self.lora_rank, "an integer >= 0")
        valid_alpha = 0 < self.lora_alpha < math.inf
        _require(valid_alpha, "finetune.lora_alpha", self.lora_alpha, "a positive number")
        for target in self.lora_targets:
            _require_one_of("finetune.lora_targets", target, LORA_TARGETS)
        distinct = len(self.lora_targets) > 0 and len(set(self.lora_targets)) == len(self.lora_targets)
        _require(distinct, "finetune.lora_targets", self.lora_targets, "one or more distinct names")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    engine: str = "auto"  # "vllm", "transformers", "openai" (a server), or "auto": vLLM where it really generates
    python: str | None = None  # interpreter of the worker, when the engine lives in another virtualenv
    benchmarks: tuple[str, ...] = ()  # FILE, NAME=FILE, NAME=hub id, or a name: evaluation.benchmark_sources
    system_prompts: str = "by_kind"  # "by_kind" (built in), "none", or a JSON file {kind: text}
    include_base: bool = True  # measure the student before fine-tuning too
    samples: int = 5  # per problem and seed: the k of Acc@k
    seeds: tuple[int, ...] = (0, 1, 2)  # decoding seeds
    temperature: float = 0.6
    top_p: float = 0.95
    repetition_penalty: float = 1.0
    max_tokens: int = 32_768  # generated tokens per sample
    grader: str = "math_verify"  # or "paper": the plain rules of Appendix C.4
    tensor_parallel: int = 1  # GPUs per engine
    engines: int | None = None  # side by side, the problems dealt out to them; None: as many as there are GPUs for
    server: str | None = None  # base URL with "/v1", of a server that takes prompts as token ids; engine "openai"
    server_model: str | None = None  # the student's name there; "{student}" in it becomes base, lark_B3 and so on
    server_key_variable: str | None = None  # environment variable that holds the key, where the server wants one
    server_concurrency: int = 64  # requests under way
    server_timeout: float = 3_600.0  # seconds for one sample
    server_retries: int = 5  # after failures that may pass, per sample

    def __post_init__(self) -> None:
        _require_one_of("evaluate.engine", self.engine, ("auto", "vllm", "transformers", "openai"))
        _require_one_of("evaluate.grader", self.grader, ("math_verify", "paper"))
        for name in ("samples", "max_tokens", "tensor_parallel"):
            _require(getattr(self, name) >= 1, f"evaluate.{name}", getattr(self, name), "an integer >= 1")
        _require(self.engines is None or self.engines >= 1, "evaluate.engines", self.engines, "an integer >= 1")
        distinct_seeds = len(self.seeds) > 0 and len(set(self.seeds)) == len(self.seeds)
        _require(distinct_seeds, "evaluate.seeds", self.seeds, "one or more distinct integers")
        _require(min(self.seeds) >= 0, "evaluate.seeds", self.seeds, "integers >= 0")
        _require(0 <= self.temperature < math.inf, "evaluate.temperature", self.temperature, "a number >= 0")
        _require(0 < self.top_p <= 1, "evaluate.top_p", self.top_p, "a number in (0, 1]")
        different = "1 with temperature 0 (all samples would be equal)"
        _require(self.temperature > 0 or self.samples == 1, "evaluate.samples", self.samples, different)
        positive_penalty = 0 < self.repetition_penalty < math.inf
        _require(positive_penalty, "evaluate.repetition_penalty", self.repetition_penalty, "a number > 0")
        if self.engine == "openai":
            _require_url("evaluate.server", self.server)
            _require(bool(self.server_model), "evaluate.server_model", self.server_model, "a model's name")
        _require_variable("evaluate.server_key_variable", self.server_key_variable)
        for name in ("server_concurrency", "server_timeout"):
            value = getattr(self, name)
            _require(0 < value < math.inf, f"evaluate.{name}", value, "a positive number")
        _require(self.server_retries >= 0, "evaluate.server_retries", self.server_retries, "an integer >= 0")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """In several processes, scoring has one mesh per process, over its own devices, where the student fits there.

    Then processes need not talk to each other. Where it does not fit, or data x tensor is given as the number of all
    devices of all processes, one mesh spans them all.
    """

    data: int = -1  # devices along which rows (and, in fine-tuning, parameters) are split; -1: the rest
    tensor: int = 1  # devices along which single layers are split

    def __post_init__(self) -> None:
        _require(self.data == -1 or self.data >= 1, "mesh.data", self.data, "-1 or an integer >= 1")
        _require(self.tensor >= 1, "mesh.tensor", self.tensor, "an integer >= 1")


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """The processes of one run. Results do not depend on them, and no stage has them among its inputs."""

    start: str = "auto"  # "auto": as one of several where the launcher says so; "never": alone
    coordinator: str | None = None  # host:port of process 0; with the next two, where no launcher is recognised
    num_processes: int | None = None
    process_id: int | None = None  # 0 to num_processes - 1
    connect_timeout: int = 300  # seconds for all processes to come
    lost_timeout: int = 60  # seconds without a sign of life from one process after which the others end

    def __post_init__(self) -> None:
        _require_one_of("distributed.start", self.start, ("auto", "never"))
        given = [value for value in (self.coordinator, self.num_processes, self.process_id) if value is not None]
        _require(len(given) in (0, 3), "distributed", given, "coordinator, num_processes and process_id together")
        if self.coordinator is not None and self.num_processes is not None and self.process_id is not None:
            host, _, port = self.coordinator.rpartition(":")
            _require(bool(host) and port.isdecimal(), "distributed.coordinator", self.coordinator, "host:port")
            _require(self.num_processes >= 1, "distributed.num_processes", self.num_processes, "an integer >= 1")
            allowed = f"an integer from 0 to num_processes - 1 = {self.num_processes - 1}"
            _require(0 <= self.process_id < self.num_processes, "distributed.process_id", self.process_id, allowed)
        for name in ("connect_timeout", "lost_timeout"):
            _require(getattr(self, name) >= 1, f"distributed.{name}", getattr(self, name), "an integer >= 1")


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """The embedded experiment (stage "prepare"): problems, teachers' pool, tokenizer and a small student."""

    num_problems: int = 200  # in the pool
    num_test_problems: int = 100  # held out, the benchmark
    rollouts: int = 3  # per teacher and problem
    num_pretrain_problems: int = 12_000  # seen by the base student only, disjoint from the other two
    pretrain_epochs: int = 1
    pretrain_batch_size: int = 16  # trajectories per step: copying numbers takes a few hundred steps to appear
    pretrain_learning_rate: float = 6e-3
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 2  # head_dim = hidden_size / num_heads; the evaluation engine needs >= 32
    num_kv_heads: int = 1
    intermediate_size: int = 256

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _require(0 < value < math.inf, f"synthetic.{field.name}", value, "a positive number")
        divides = self.hidden_size % self.num_heads == 0 and self.num_heads % self.num_kv_heads == 0
        _require(
            divides,
            "synthetic.num_heads",
            self.num_heads,
            "a divisor of hidden_size, a multiple of num_kv_heads",
        )


@dataclasses.dataclass(frozen=True)
class Experiment:
    workdir: str  # every stage writes below it
    student: StudentConfig
    pool: PoolConfig
    seed: int = 42
    stages: tuple[str, ...] = ("score", "select", "finetune", "export", "evaluate", "report")
    score: ScoreConfig = ScoreConfig()
    select: SelectConfig = SelectConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    synthetic: SyntheticConfig | None = None

    def __post_init__(self) -> None:
        _require(bool(self.workdir), "workdir", self.workdir, "a folder")
        _require(self.seed >= 0, "seed", self.seed, "an integer >= 0")
        _require(len(self.stages) > 0, "stages", self.stages, "one or more of " + ", ".join(STAGES))
        for stage in self.stages:
            _require_one_of("stages", stage, STAGES)
        _require(len(set(self.stages)) == len(self.stages), "stages", self.stages, "each stage at most once")
        synthetic_given = "prepare" not in self.stages or self.synthetic is not None
        _require(synthetic_given, "synthetic", None, 'a section, since "prepare" is among the stages')
        if "evaluate" in self.stages:
            _require(len(self.evaluate.benchmarks) > 0, "evaluate.benchmarks", (), "one or more benchmark files")
            self._require_a_served_model_per_student()

    def _require_a_served_model_per_student(self) -> None:
        """A server holds the weights of one student under one name."""
        methods = len(self.select.methods) + (self.select.score is not None)
        students = methods * len(self.select.budgets) + self.evaluate.include_base
        model = self.evaluate.server_model
        if self.evaluate.engine == "openai" and students > 1 and model is not None:
            allowed = f'a name with "{STUDENT_PLACEHOLDER}" in it, since {students} students are evaluated'
            _require(STUDENT_PLACEHOLDER in model, "evaluate.server_model", model, allowed)


def experiment_from_mapping(values: Mapping[str, Any]) -> Experiment:
    """Builds the experiment from nested mappings (an `ml_collections.ConfigDict` or plain dictionaries).

    Raises:
      ConfigError: a field is unknown (with the nearest known name), missing, of the wrong type, or out of range.
    """
    return section_from_mapping(Experiment, values, prefix="")


def distributed_from_mapping(values: Mapping[str, Any]) -> DistributedConfig:
    """The section `distributed` alone, which is needed before the others are looked at.

    Raises:
      ConfigError: as `experiment_from_mapping`, for this section.
    """
    return converted(DistributedConfig, values.get("distributed", {}), "distributed")


def pool_from_mapping(values: Mapping[str, Any]) -> PoolConfig:
    """The section `pool` alone, for those who only look at a pool.

    Raises:
      ConfigError: as `experiment_from_mapping`, for this section.
    """
    return converted(PoolConfig, values.get("pool", {}), "pool")


def student_from_mapping(values: Mapping[str, Any]) -> StudentConfig:
    """The section `student` alone, likewise.

    Raises:
      ConfigError: as `experiment_from_mapping`, for this section.
    """
    return converted(StudentConfig, values.get("student", {}), "student")
