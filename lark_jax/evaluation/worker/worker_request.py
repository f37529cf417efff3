"""What the parent asks of the worker. Standard library only; used on both sides."""

import dataclasses
import hashlib
import json
from pathlib import Path

OUTPUT_FORMAT = 2
LINE_IDENTITY = ("benchmark", "problem_id", "seed", "asked")  # of a line of it: a job's key and mark
SEED_STRIDE = 1_000_003  # between decoding seeds
SEED_MODULUS = 1 << 32  # torch's CPU generator reads only the low 32 bits of a seed


@dataclasses.dataclass(frozen=True)
class Prompt:
    benchmark: str
    problem_id: str
    index: int  # of the problem in its benchmark: fixes its seed
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Server:
    """Where an OpenAI-compatible server is and how hard it may be asked; of these only `model` decides the samples."""

    url: str  # up to and with "/v1"
    model: str  # its name there
    key_variable: str | None  # environment variable with the key, which is never written down
    concurrency: int  # requests under way
    timeout_s: float  # for one attempt
    retries: int  # more attempts after a failure that may pass


@dataclasses.dataclass(frozen=True)
class Request:
    fingerprint: str  # of what decides any sample, whatever else is asked; guards against resuming other work
    engine: str  # "vllm", "transformers" or "openai"
    model: str  # folder with weights and tokenizer
    output: str
    dtype: str  # "float32", "bfloat16", ..., or "auto"
    tensor_parallel: int
    max_model_len: int  # prompt and generated tokens together
    max_tokens: int  # generated tokens per sample
    stop_ids: tuple[int, ...]  # generation ends at any of these; they count as a token but leave no text
    pad_id: int
    samples: int
    seeds: tuple[int, ...]  # decoding seeds, all served by one engine start
    temperature: float  # 0: greedy
    top_p: float
    repetition_penalty: float
    prompts: tuple[Prompt, ...]
    server: Server | None = None  # for engine "openai"
    answer_schema: str | None = None  # JSON schema, as text, that samples have to follow; engine "vllm" alone
    engines: int | None = None  # side by side, of `tensor_parallel` GPUs each; None: as many as there are GPUs for

    def budget(self, prompt: Prompt) -> int:
        """Tokens that may be generated after this prompt."""
        return min(self.max_tokens, self.max_model_len - len(prompt.tokens))

    def jobs(self) -> tuple["Job", ...]:
        """In the order of the output file: by decoding seed, then by prompt."""
        return tuple(Job(prompt, seed) for seed in self.seeds for prompt in self.prompts)

    def header(self) -> str:
        """The first line of the output file."""
        return json.dumps({"format": OUTPUT_FORMAT, "fingerprint": self.fingerprint})

    def mark(self, job: "Job") -> str:
        """What a job's samples depend on beside the fingerprint, as 16 hexadecimal digits."""
        own = [job.prompt.tokens, self.first_seed(job), self.budget(job.prompt)]
        return hashlib.sha256(json.dumps(own).encode()).hexdigest()[:16]

    def first_seed(self, job: "Job") -> int:
        """Sample i of a job draws with `first_seed + i`, whatever else runs or has run.

        The seeds of problems are `samples` apart and those of decoding seeds `SEED_STRIDE`, modulo 2^32.
        """
        return (job.seed * SEED_STRIDE + job.prompt.index * self.samples) % SEED_MODULUS


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
    num_tokens: int  # the stop token included


def write_request(path: str | Path, request: Request) -> None:
    Path(path).write_text(json.dumps(dataclasses.asdict(request)), encoding="utf-8")


def read_request(path: str | Path) -> Request:
    fields = json.loads(Path(path).read_text(encoding="utf-8"))
    prompts = tuple(Prompt(**{**prompt, "tokens": tuple(prompt["tokens"])}) for prompt in fields.pop("prompts"))
    fields.update({name: tuple(fields[name]) for name in ("stop_ids", "seeds")})
    server = fields.pop("server")
    return Request(prompts=prompts, server=None if server is None else Server(**server), **fields)
