"""Experiments, and answers as of a compiler, for tests that compile nothing."""

from typing import Any

from lark_jax.config import Experiment, PoolConfig, StudentConfig
from lark_jax.preflight.check import Setup
from lark_jax.preflight.cost import Assumptions
from lark_jax.preflight.lengths import Lengths
from lark_jax.preflight.requests import CompileAnswer, Memory
from lark_jax.preflight.topologies import Topology
from lark_jax.students.architecture import Architecture


def experiment_of(stage: str, **sections: Any) -> Experiment:
    student, pool = StudentConfig(path="nowhere/student"), PoolConfig(path="nowhere/pool.jsonl")
    return Experiment(workdir="runs/x", stages=(stage,), student=student, pool=pool, **sections)


def setup_of(experiment: Experiment, architecture: Architecture, topology: Topology, lengths: Lengths) -> Setup:
    return Setup("qwen", architecture, experiment, topology, lengths, Assumptions())


def answer_with(memory: Memory, **fields: Any) -> CompileAnswer:
    """One mesh, no communication; `fields` replace or add to these."""
    values: dict[str, Any] = {
        "meshes": 1,
        "parameter_axes": ("data",),
        "attention": "splash",
        "collectives": (),
        "short_collectives": (),
        "short_length": 128,
        "compile_seconds": 0.0,
        "compiler": "none",
    }
    return CompileAnswer(memory=memory, **{**values, **fields})
