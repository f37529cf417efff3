"""Tiny students on disk: a random one, and one whose answers are known exactly. The worker with a fake engine."""

import functools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from flax import nnx

from lark_jax.config import EvaluateConfig
from lark_jax.evaluation.engines import WORKER, choose_engine, run_generation
from lark_jax.evaluation.generation_request import build_request
from lark_jax.evaluation.prompts import StudentPrompts
from lark_jax.evaluation.worker.worker_records import Generation, Job, Prompt, Request, Sample
from lark_jax.students import export_student, load_student
from lark_jax.students.parameters import flatten_parameters, replace_parameters

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 128
MANY_PROMPTS = 80  # of three samples each: more than one batch of the transformers engine


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per ASCII character, ChatML."""
    characters = sorted({chr(code) for code in range(32, 127)} | {"\n"})
    to_byte_level = {" ": "Ġ", "\n": "Ċ"}
    vocab = {to_byte_level.get(character, character): index for index, character in enumerate(characters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def _config(**changes: object) -> transformers.Qwen2Config:
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tiny_tokenizer().convert_tokens_to_ids("<|im_end|>"),
        "dtype": "float32",
    }
    return transformers.Qwen2Config(**{**fields, **changes})


def _save(model: transformers.Qwen2ForCausalLM, folder: Path) -> Path:
    model.float().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random float32 Qwen2 with head_dim 32 and weights large enough for clear choices."""
    torch.manual_seed(7)
    return _save(transformers.Qwen2ForCausalLM(_config(initializer_range=0.15)), tmp_path_factory.mktemp("random"))


def save_bigram_student(folder: Path, seven: float) -> Path:
    """A student that answers every prompt by "\\boxed{7}" with probability `seven` and by "\\boxed{8}" otherwise.

    Attention and MLP add nothing and embeddings are one-hot, so the head is a table of next-token log-probabilities.
    """
    tokenizer = tiny_tokenizer()
    model = transformers.Qwen2ForCausalLM(_config())
    size = model.config.hidden_size
    follows = {"\n": "\\", "\\": "b", "b": "o", "o": "x", "x": "e", "e": "d", "d": "{", "7": "}", "8": "}"}
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB_SIZE, size))
        table = torch.full((VOCAB_SIZE, VOCAB_SIZE), -50.0)  # [token, next token]
        for token, following in follows.items():
            table[tokenizer.encode(token)[0], tokenizer.encode(following)[0]] = 0.0
        table[tokenizer.encode("{")[0], tokenizer.encode("7")[0]] = math.log(seven)
        table[tokenizer.encode("{")[0], tokenizer.encode("8")[0]] = math.log(1 - seven)
        table[tokenizer.encode("}")[0], tokenizer.eos_token_id] = 0.0
        model.lm_head.weight.copy_(table.T / math.sqrt(size))  # the final norm scales a one-hot by sqrt(size)
    return _save(model, folder)


@pytest.fixture(scope="session")
def trained_decoder(random_student: Path) -> nnx.Module:
    """The random student's decoder with other weights, as after fine-tuning."""
    graph, state = nnx.split(load_student(random_student, dtype=jnp.float32)[0])
    noise = np.random.default_rng()
    values = {
        name: value + 0.05 * noise.standard_normal(value.shape, np.float32)
        for name, value in flatten_parameters(state).items()
    }
    return nnx.merge(graph, replace_parameters(state, values))


@pytest.fixture(scope="session")
def trained_student(
    trained_decoder: nnx.Module, random_student: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder that `trained_decoder` is exported to."""
    folder = tmp_path_factory.mktemp("trained") / "student"
    export_student(trained_decoder, random_student, folder)
    return folder


@pytest.fixture(scope="session")
def bigram_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bigram_student(tmp_path_factory.mktemp("bigram"), seven=0.25)


MakeRequest = Callable[..., Request]


@pytest.fixture(scope="session")
def make_request() -> MakeRequest:
    """A request for prompts of awkward lengths; keywords go to `EvaluateConfig`."""

    def make(model: Path, output: Path, engine: str, num_prompts: int = 5, **config: object) -> Request:
        tokenizer = tiny_tokenizer()
        prompts = tuple(
            Prompt("b", f"p{index}", index, tuple(tokenizer.encode(f"Question {'x' * (index * 7 % 23)}{index}?\n")))
            for index in range(num_prompts)
        )
        evaluate = EvaluateConfig(**{"samples": 3, "seeds": (0, 5), "max_tokens": 24, "temperature": 1.0, **config})
        asked = StudentPrompts(prompts, frozenset(), tokenizer.eos_token_id, tokenizer.pad_token_id)
        return build_request(model, "weights", asked, evaluate, engine, output)

    return make


@dataclass(frozen=True)
class Reference:
    """A request of the trained student that one engine served in one go."""

    request: Request
    output: bytes


@pytest.fixture(scope="session")
def reference_of(
    trained_student: Path, make_request: MakeRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Reference]:
    """Engine -> its samples, which killed workers, several engines and a server must reproduce. Generated once."""

    @functools.cache
    def generated(engine: str) -> Reference:
        folder = tmp_path_factory.mktemp(engine)
        options = {"num_prompts": MANY_PROMPTS, "repetition_penalty": 1.1, "top_p": 0.9, "engines": 1}
        request = make_request(trained_student, folder / "out.jsonl", engine, **options)
        run_generation(request, None, folder)
        return Reference(request, Path(request.output).read_bytes())

    return generated


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The worker's main module, imported as it imports its siblings."""
    monkeypatch.syspath_prepend(str(WORKER.parent))
    sys.modules.pop("main", None)
    import main as worker_main

    yield worker_main
    sys.modules.pop("main", None)


class FakeEngine:
    """Yields the last job first, as an engine may; records what it was asked for; can die halfway."""

    def __init__(self, die_after: int | None = None) -> None:
        self.die_after = die_after
        self.asked: list[tuple[str, str, int]] = []

    def __call__(self, request: Request, pending: Sequence[Job]) -> Iterator[Generation]:
        for count, job in enumerate(reversed(pending)):
            if count == self.die_after:
                raise RuntimeError("engine died")
            self.asked.append(job.key)
            texts = [f"{job.key} é {request.first_seed(job) + index}" for index in range(request.samples)]
            yield Generation(job, tuple(Sample(text, "stop", len(text)) for text in texts))


RunFake = Callable[..., list[tuple[str, str, int]]]


@pytest.fixture
def run_fake(main: Any, monkeypatch: pytest.MonkeyPatch) -> RunFake:
    """Runs the worker in this process with a fake engine; returns the jobs that it was asked for."""

    def run(request: Request, die_after: int | None = None) -> list[tuple[str, str, int]]:
        engine = FakeEngine(die_after)
        monkeypatch.setattr(main, "engine_named", lambda _: engine)
        main.run(request, Path(request.output).with_name("unread.json"))
        return engine.asked

    return run


@pytest.fixture(scope="session")
def single_thread_worker() -> None:
    """Workers share two cores with the suite."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def vllm_reason(tmp_path_factory: pytest.TempPathFactory, random_student: Path, make_request: MakeRequest) -> str:
    """Why vLLM cannot be tested here; empty if its health check generates."""
    folder = tmp_path_factory.mktemp("vllm")
    request = make_request(random_student, folder / "out.jsonl", "transformers")
    choice = choose_engine(EvaluateConfig(engine="auto"), request, folder)
    return "" if choice.engine == "vllm" else choice.reason


@pytest.fixture(params=["transformers", "vllm"])
def engine(request: pytest.FixtureRequest, single_thread_worker: None) -> str:  # noqa: ARG001
    if request.param == "vllm" and (reason := request.getfixturevalue("vllm_reason")):
        pytest.skip(reason)
    return str(request.param)
