"""Findings on fine-tuning as text for people and as JSON for programs."""

import dataclasses
from typing import Any

from lark_jax.preflight.cost import total_sent
from lark_jax.preflight.report import gib, mesh_text, table
from lark_jax.preflight.training import PolicyFinding, TrainingFindings
from lark_jax.students.lora import Lora


def training_as_text(findings: TrainingFindings) -> str:
    """One line per memory policy, what they have in common, and which one to use."""
    first, topology = findings.policies[0].answers[0], findings.topology
    shapes = [f"{answer.rows_per_device} x {answer.length:,}" for answer in findings.policies[0].answers]
    memory, update = first.memory, findings.update.memory
    common = [
        ("parameters", gib(memory.parameters), _trained(findings.lora)),
        ("moments of Adam", gib(memory.resident), "float32"),
        ("sums of the gradients", gib(memory.resident // 2), "float32"),
    ]
    policies = [
        (_name(policy, findings), gib(findings.peak(policy)), _note(policy, findings)) for policy in findings.policies
    ]
    policies.append(("optimizer step", gib(update.total), f"{gib(update.temporary)} temporary"))
    return "\n".join(
        [
            f"finetune: {' and '.join(shapes)} tokens per device and micro-batch",
            f"  mesh {mesh_text(first)}; attention {first.attention}; compiled by {first.compiler}",
            "",
            *table("always on a device, GiB", common),
            "",
            *table(f"peak by finetune.remat, GiB of {gib(topology.memory_bytes)} usable", policies),
            *([f"    the higher of the two peaks; FLOPs and seconds of {shapes[0]} tokens"] if shapes[1:] else []),
            "",
            _verdict(findings),
        ]
    )


def training_as_json(findings: TrainingFindings) -> dict[str, Any]:
    """The same content; bytes, FLOPs and seconds in plain numbers."""
    fastest = findings.fastest
    return {
        "student": findings.student,
        "topology": findings.topology.name,
        "configured": findings.configured,
        "lora": None if findings.lora is None else dataclasses.asdict(findings.lora),
        "fits": findings.fits,
        "fastest": None if fastest is None else fastest.remat,
        "policies": [
            {
                **dataclasses.asdict(policy),
                "answer": dataclasses.asdict(policy.answer),
                "peak": findings.peak(policy),
                "fits": findings.fits_with(policy),
                "collective_bytes": total_sent(policy.answers[0].collectives),
                "seconds_per_micro_batch": policy.time.seconds,
            }
            for policy in findings.policies
        ],
        "update": dataclasses.asdict(findings.update),
        "assumptions": dataclasses.asdict(findings.assumptions),
    }


def _trained(lora: Lora | None) -> str:
    return "float32" if lora is None else f"frozen, except for an adapter of rank {lora.rank}, float32"


def _name(policy: PolicyFinding, findings: TrainingFindings) -> str:
    return f"{policy.remat} (configured)" if policy.remat == findings.configured else policy.remat


def _note(policy: PolicyFinding, findings: TrainingFindings) -> str:
    time = f"{policy.flops / 1e12:,.0f} TFLOP, {policy.time.seconds:.1f} s ({policy.time.slowest} decides)"
    return f"{'FITS' if findings.fits_with(policy) else 'DOES NOT FIT'}  {time}"


def _verdict(findings: TrainingFindings) -> str:
    fastest = findings.fastest
    if fastest is None:
        return f"  No policy makes it fit: {_needed(findings)}"
    return f"  The fastest that fits: --config.finetune.remat={fastest.remat}"


def _needed(findings: TrainingFindings) -> str:
    """What the run needs under the policy with the lowest peak."""
    if not findings.update.memory.fits:
        return "the optimizer step already does not; it needs more devices"
    worst = min(findings.policies, key=findings.peak).answer
    tokens = worst.rows_per_device * worst.length
    rows = "shorter rows (--config.student.max_length)"
    if worst.rows_per_device > 1:
        rows = f"fewer rows at once (--config.finetune.tokens_per_batch={tokens // 2})"
    return f"it needs more devices, a tensor axis (--config.mesh.tensor), or {rows}"
