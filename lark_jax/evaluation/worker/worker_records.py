"""The records that parent and worker share: Prompt -> Job -> Generation of Samples, and the Request that carries them.

Standard library only. The worker imports this file by its bare name in an interpreter that may not have lark_jax;
lark_jax imports it as a module of the package.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

OUTPUT_FORMAT = 2
LINE_FIELDS = ("benchmark", "problem_id", "seed", "asked")  # which job a line of the output belongs to: key and mark
SEED_STRIDE = 1_000_003  # between decoding seeds
SEED_MODULUS = 1 << 32  # torch's CPU generator reads only the low 32 bits of a seed

LineKey = tuple[str, str, int, str]  # the values of LINE_FIELDS


@dataclasses.dataclass(frozen=True)
class Prompt:
    benchmark: str
    problem_id: str
    index: int  # of the problem in its benchmark: fixes its seed
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Job:
    """All samples of one problem under one decoding seed: one line of the output."""

    prompt: Prompt
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        return (self.prompt.benchmark, self.prompt.problem_id, self.seed)


@dataclasses.dataclass(frozen=True)
class Sample:
    text: str
    finish_reason: str  # "stop" or "length"
    num_tokens: int  # including the stop token


@dataclasses.dataclass(frozen=True)
class Generation:
    """What an engine generated for one job."""

    job: Job
    samples: tuple[Sample, ...]


@dataclasses.dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server and the limits for requests to it; samples depend on `model` only."""

    url: str  # up to and including "/v1"
    model: str  # its name on the server
    key_variable: str | None  # environment variable that holds the key, which is never written down
    concurrency: int  # requests in flight
    timeout_s: float  # for one attempt
    retries: int  # more attempts after a transient failure


@dataclasses.dataclass(frozen=True)
class Request:
    fingerprint: str  # of what every sample depends on, for any problems; guards against mixing runs
    engine: str  # "vllm", "transformers" or "openai"
    model: str  # folder with weights and tokenizer
    output: str
    dtype: str  # "float32", "bfloat16", ..., or "auto"
    tensor_parallel: int
    max_model_len: int  # prompt and generated tokens together
    max_tokens: int  # generated tokens per sample
    stop_ids: tuple[int, ...]  # any of these ends a sample; it counts as a token but is not part of the text
    pad_id: int
    samples: int
    seeds: tuple[int, ...]  # decoding seeds, all served by one engine start
    temperature: float  # 0: greedy
    top_p: float
    repetition_penalty: float
    prompts: tuple[Prompt, ...]
    server: Server | None = None  # for engine "openai"
    answer_schema: str | None = None  # JSON schema, as text, that samples must follow; engine "vllm" only
    engines: int | None = None  # run at once, with `tensor_parallel` GPUs each; None: as many as the GPUs allow

    def budget(self, prompt: Prompt) -> int:
        """Tokens that may be generated after this prompt."""
        return min(self.max_tokens, self.max_model_len - len(prompt.tokens))

    def jobs(self) -> tuple[Job, ...]:
        """In the order of the output file: by decoding seed, then by prompt."""
        return tuple(Job(prompt, seed) for seed in self.seeds for prompt in self.prompts)

    def first_seed(self, job: Job) -> int:
        """Sample i of a job draws with seed `first_seed + i`, independently of all other jobs.

        The seeds of problems are `samples` apart, those of decoding seeds `SEED_STRIDE`, modulo 2^32.
        """
        return (job.seed * SEED_STRIDE + job.prompt.index * self.samples) % SEED_MODULUS

    def mark(self, job: Job) -> str:
        """What a job's samples depend on besides the fingerprint, as 16 hexadecimal digits."""
        own = [job.prompt.tokens, self.first_seed(job), self.budget(job.prompt)]
        return hashlib.sha256(json.dumps(own).encode()).hexdigest()[:16]

    def header(self) -> str:
        """The first line of the output file."""
        return json.dumps({"format": OUTPUT_FORMAT, "fingerprint": self.fingerprint})

    def line_key(self, job: Job) -> LineKey:
        return (*job.key, self.mark(job))

    def line(self, generation: Generation) -> str:
        """A job's line of the output file."""
        key = dict(zip(LINE_FIELDS, self.line_key(generation.job), strict=True))
        return json.dumps({**key, "samples": [dataclasses.asdict(sample) for sample in generation.samples]})


def write_request(path: str | Path, request: Request) -> None:
    Path(path).write_text(json.dumps(dataclasses.asdict(request)), encoding="utf-8")


def read_request(path: str | Path) -> Request:
    fields = json.loads(Path(path).read_text(encoding="utf-8"))
    prompts = tuple(Prompt(**{**prompt, "tokens": tuple(prompt["tokens"])}) for prompt in fields.pop("prompts"))
    fields.update({name: tuple(fields[name]) for name in ("stop_ids", "seeds")})
    server = fields.pop("server")
    return Request(prompts=prompts, server=None if server is None else Server(**server), **fields)
