"""The findings as text for people and as JSON for programs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lark_jax.preflight.check import Finding, PolicyFinding, ScoringFindings, TrainingFindings
from lark_jax.preflight.cost import total_sent
from lark_jax.preflight.hardware import GIB
from lark_jax.preflight.remedies import Remedy
from lark_jax.preflight.requests import CompileAnswer
from lark_jax.students.flops import parameter_count

_NOTES_ON_ATTENTION = {"cudnn": "without cuDNN's workspace, which is planned on the card; near zero in forward passes"}


def scoring_as_text(findings: ScoringFindings) -> str:
    """One block per compiled program, then settings that fit if the configured ones do not, and the pool's time."""
    blocks = [_heading(findings)]
    blocks += [_program(program, findings) for program in findings.programs]
    if findings.remedy is not None:
        blocks.append(_remedy(findings.remedy))
    blocks.append(_pool(findings))
    return "\n\n".join(blocks) + "\n"


def scoring_as_json(findings: ScoringFindings) -> dict[str, Any]:
    """The same content; bytes, FLOPs and seconds in plain numbers."""
    setup, remedy = findings.setup, findings.remedy
    return {
        "student": setup.student,
        "topology": {**dataclasses.asdict(setup.topology), "num_devices": setup.topology.num_devices},
        "fits": findings.fits,
        "programs": [
            {
                **dataclasses.asdict(program),
                "fits": program.answer.memory.fits,
                "collective_bytes": total_sent(program.answer.collectives),
                "seconds_per_step": program.time.seconds,
            }
            for program in findings.programs
        ],
        "remedy": None
        if remedy is None
        else {
            "settings": remedy.settings,
            "programs": [dataclasses.asdict(answer) for answer in remedy.answers],
            "tried": remedy.tried,
        },
        "pool": {
            **dataclasses.asdict(findings.pool),
            "rows": len(setup.lengths.inputs),
            "lengths": setup.lengths.source,
        },
        "assumptions": dataclasses.asdict(setup.assumptions),
    }


def training_as_text(findings: TrainingFindings) -> str:
    """One line per memory policy, what they have in common, and which one to use."""
    first, topology = findings.policies[0].answers[0], findings.setup.topology
    shapes = [f"{answer.rows_per_device} x {answer.length:,}" for answer in findings.policies[0].answers]
    memory, update, lora = first.memory, findings.update.memory, findings.lora
    trained = "float32" if lora is None else f"frozen, except for an adapter of rank {lora.rank}, float32"
    common = [
        ("parameters", _gib(memory.parameters), trained),
        ("moments of Adam", _gib(memory.resident), "float32"),
        ("sums of the gradients", _gib(memory.resident // 2), "float32"),
    ]
    policies = [_policy(policy, findings) for policy in findings.policies]
    policies.append(("optimizer step", _gib(update.total), f"{_gib(update.temporary)} temporary"))
    return "\n".join(
        [
            f"finetune: {' and '.join(shapes)} tokens per device and micro-batch",
            f"  mesh {_mesh(first)}; attention {first.attention}; compiled by {first.compiler}",
            "",
            *_table("always on a device, GiB", common),
            "",
            *_table(f"peak by finetune.remat, GiB of {_gib(topology.memory_bytes)} usable", policies),
            *([f"    the higher of the two peaks; FLOPs and seconds of {shapes[0]} tokens"] if shapes[1:] else []),
            "",
            _training_verdict(findings),
        ]
    )


def training_as_json(findings: TrainingFindings) -> dict[str, Any]:
    """The same content; bytes, FLOPs and seconds in plain numbers."""
    setup, lora, fastest = findings.setup, findings.lora, findings.fastest
    return {
        "student": setup.student,
        "topology": setup.topology.name,
        "configured": findings.configured,
        "lora": None if lora is None else dataclasses.asdict(lora),
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
        "assumptions": dataclasses.asdict(setup.assumptions),
    }


def _heading(findings: ScoringFindings) -> str:
    topology = findings.setup.topology
    parameters = parameter_count(findings.programs[0].request.architecture)
    hosts = f"{topology.num_hosts} hosts" if topology.num_hosts > 1 else "1 host"
    return (
        f"{findings.setup.student} ({parameters / 1e9:.1f} billion parameters) on {topology.name}: "
        f"{topology.num_devices} x {topology.chip.name}, {hosts}, {_gib(topology.memory_bytes)} GiB usable per device"
    )


def _program(program: Finding, findings: ScoringFindings) -> str:
    request, answer, memory = program.request, program.answer, program.answer.memory
    rows = [
        ("parameters", memory.parameters, f"{_split(answer)}, {request.dtype}"),
        ("other arguments", memory.arguments - memory.parameters, "rows of tokens, and padding by the compiler"),
        ("output", memory.output, ""),
        ("temporary", memory.temporary, _NOTES_ON_ATTENTION.get(answer.attention, "")),
        ("program", memory.code, ""),
        ("total", memory.total, f"of {_gib(memory.available)} usable"),
    ]
    return "\n".join(
        [
            f"{request.step}: {answer.rows_per_device} x {answer.length:,} tokens per device",
            f"  mesh {_mesh(answer)}; attention {answer.attention}; compiled by {answer.compiler} in "
            f"{answer.compile_seconds:.0f} s",
            "",
            *_table("memory per device, GiB", [(name, _gib(size), note) for name, size, note in rows]),
            "",
            *_table("one step, per device", _costs(program, findings)),
            "",
            _verdict(program),
        ]
    )


def _costs(program: Finding, findings: ScoringFindings) -> list[tuple[str, str, str]]:
    cost, time, chip = program.cost, program.time, findings.setup.topology.chip
    shares = findings.setup.assumptions
    bandwidth = cost.sent_bytes / (time.network * shares.network) if time.network else 0.0
    sent = [
        (f"  {item.kind} over {item.axes}", _gib(item.bytes_sent), f"GiB, {item.times} times")
        for item in program.answer.collectives
        if item.bytes_sent >= GIB / 20
    ]
    at = "s at {:.0%} of".format
    return [
        (
            "compute",
            f"{cost.flops / 1e12:,.1f}",
            f"TFLOP    {time.compute:.2f} {at(shares.compute)} {chip.peak_flops / 1e12:,.0f} TFLOP/s",
        ),
        (
            "memory traffic",
            _gib(cost.memory_bytes),
            f"GiB      {time.memory:.2f} {at(shares.memory)} {chip.memory_bandwidth / 1e9:,.0f} GB/s (estimate)",
        ),
        (
            "sent to others",
            _gib(cost.sent_bytes),
            f"GiB      {time.network:.2f} {at(shares.network)} {bandwidth / 1e9:,.0f} GB/s" if bandwidth else "GiB",
        ),
        *sent,
        ("longest of these", f"{time.seconds:.2f}", f"s        {time.slowest}"),
    ]


def _verdict(program: Finding) -> str:
    memory = program.answer.memory
    if memory.fits:
        return f"  FITS, {_gib(memory.available - memory.total)} GiB to spare"
    return f"  DOES NOT FIT, by {(memory.total - memory.available) / GIB:.2f} GiB"


def _remedy(remedy: Remedy) -> str:
    tried = [f"    tried, does not fit: {settings}" for settings in remedy.tried]
    if not remedy.found:
        return "\n".join(["No setting makes it fit; it needs devices with more memory, or more of them.", *tried])
    total = _gib(max(answer.memory.total for answer in remedy.answers))
    return "\n".join([f"This was compiled and fits, with {total} GiB:", f"    {remedy.settings}", *tried])


def _pool(findings: ScoringFindings) -> str:
    pool, shares, lengths = findings.pool, findings.setup.assumptions, findings.setup.lengths
    condition = "" if findings.fits else " once it fits"
    duration = f"{pool.hours * 60:.1f} min" if pool.hours < 2 else f"{pool.hours:,.1f} h"
    return "\n".join(
        [
            f"The pool: about {duration}{condition}; limited by {pool.slowest}",
            f"  work         {len(lengths.inputs):,} rows, {pool.tokens:,} tokens, {pool.padding:.1%} padding, "
            f"{pool.steps:,} steps of {pool.shapes} shapes",
            f"  lengths      {lengths.source}",
            f"  assumptions  {shares.compute:.0%} of the peak rate, {shares.memory:.0%} of memory and "
            f"{shares.network:.0%} of network bandwidth; the slowest hides the others;",
            "               loading, compiling and the host's work are not in it",
        ]
    )


def _table(title: str, rows: Sequence[tuple[str, str, str]]) -> list[str]:
    return [f"  {title}", *(f"    {name:<32}{value:>10}  {note}".rstrip() for name, value, note in rows)]


def _split(answer: CompileAnswer) -> str:
    if not answer.parameter_axes:
        return "whole on every device"
    how = {"data": "gathered layer by layer over data", "tensor": "split over tensor"}
    return " and ".join(how[axis] for axis in answer.parameter_axes)


def _mesh(answer: CompileAnswer) -> str:
    shape = f"data={answer.data} x tensor={answer.tensor}"
    return f"{shape} in each of {answer.meshes} hosts" if answer.meshes > 1 else shape


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}"


def _policy(policy: PolicyFinding, findings: TrainingFindings) -> tuple[str, str, str]:
    name = f"{policy.remat} (configured)" if policy.remat == findings.configured else policy.remat
    fits = "FITS" if findings.fits_with(policy) else "DOES NOT FIT"
    time = f"{policy.flops / 1e12:,.0f} TFLOP, {policy.time.seconds:.1f} s (limited by {policy.time.slowest})"
    return name, _gib(findings.peak(policy)), f"{fits}  {time}"


def _training_verdict(findings: TrainingFindings) -> str:
    if findings.fastest is not None:
        return f"  The fastest that fits: --config.finetune.remat={findings.fastest.remat}"
    if not findings.update.memory.fits:
        return "  No policy makes it fit: the optimizer step already does not; it needs more devices"
    worst = min(findings.policies, key=findings.peak).answer
    tokens = worst.rows_per_device * worst.length
    rows = "shorter rows (--config.student.max_length)"
    if worst.rows_per_device > 1:
        rows = f"fewer rows at once (--config.finetune.tokens_per_batch={tokens // 2})"
    return f"  No policy makes it fit: it needs more devices, a tensor axis (--config.mesh.tensor), or {rows}"
