"""The programs whose memory is budgeted, and the file of budgets that `record_budgets.py` writes."""

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path

from compiler_answers import experiment_of, setup_of
from student_shapes import STUDENT_SHAPES

from lark_jax.config import FinetuneConfig
from lark_jax.preflight.check import training_requests
from lark_jax.preflight.lengths import Lengths
from lark_jax.preflight.requests import CompileRequest
from lark_jax.preflight.topologies import parse_topology
from lark_jax.students.architecture import architecture_from_config

BUDGETS = Path(__file__).with_name("budgets.json")
LENGTH = 32_768

# name -> student and slice; one row of 32,768 tokens per chip, everything else at its default.
SCORING: Mapping[str, tuple[str, str]] = {
    "qwen2.5-1.5b on v5e-4": ("qwen2.5-1.5b", "v5e-4"),
    "llama-3.2-3b on v5e-8": ("llama-3.2-3b", "v5e-8"),
    "qwen2.5-7b on v5e-16": ("qwen2.5-7b", "v5e-16"),
    "qwen2.5-7b on v5p-8": ("qwen2.5-7b", "v5p-8"),
    "qwen2.5-72b on v5p-64": ("qwen2.5-72b", "v5p-64"),
}
# name -> student, slice and memory policy; the same rows.
TRAINING: Mapping[str, tuple[str, str, str]] = {
    "fine-tuning qwen2.5-7b on v5e-64": ("qwen2.5-7b", "v5e-64", "offload"),
    "fine-tuning qwen2.5-7b on v5p-16": ("qwen2.5-7b", "v5p-16", "block"),
}
CASES = (*SCORING, *TRAINING)


def request_of(case: str) -> CompileRequest:
    if case in SCORING:
        return score_request(*SCORING[case])
    student, name, remat = TRAINING[case]
    topology = parse_topology(name)
    experiment = experiment_of("finetune", finetune=FinetuneConfig(remat=remat))
    architecture = architecture_from_config(STUDENT_SHAPES[student])
    (request,) = training_requests(setup_of(experiment, architecture, topology, Lengths((LENGTH,), "given")))
    return request


def score_request(student: str, topology: str, **changes: object) -> CompileRequest:
    values = {
        "step": "score",
        "architecture": architecture_from_config(STUDENT_SHAPES[student]),
        "topology": topology,
        "data": -1,
        "tensor": 1,
        "dtype": "bfloat16",
        "parameters": "auto",
        "attention": "auto",
        "vocab_chunk": 4_096,
        "rows_per_device": 1,
        "length": LENGTH,
    }
    return CompileRequest(**{**values, **changes})


def libtpu_version() -> str | None:
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return None


def read_budgets() -> dict[str, dict[str, dict[str, int]]]:
    """libtpu version -> case -> {"arguments": bytes, "temporary": bytes}."""
    return json.loads(BUDGETS.read_text(encoding="utf-8"))
