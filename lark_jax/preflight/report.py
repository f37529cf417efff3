"""The findings as text for people and as JSON for programs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lark_jax.preflight.check import Finding, Findings
from lark_jax.preflight.cost import total_sent
from lark_jax.preflight.hardware import GIB
from lark_jax.preflight.remedies import Remedy
from lark_jax.preflight.requests import CompileAnswer
from lark_jax.students.flops import parameter_count

_NOTES_ON_ATTENTION = {
    "cudnn": "without cuDNN's workspace, which is planned on the card; forward it is about nothing",
}


def as_text(findings: Findings) -> str:
    """One block per compiled program, then settings that fit if the configured ones do not, and the pool's time."""
    blocks = [_heading(findings)]
    blocks += [_program(program, findings) for program in findings.programs]
    if findings.remedy is not None:
        blocks.append(_remedy(findings.remedy))
    blocks.append(_pool(findings))
    return "\n\n".join(blocks) + "\n"


def as_json(findings: Findings) -> dict[str, Any]:
    """The same content; bytes, FLOPs and seconds in plain numbers."""
    return {
        "student": findings.student,
        "topology": {**dataclasses.asdict(findings.topology), "num_devices": findings.topology.num_devices},
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
        "remedy": None if findings.remedy is None else _remedy_as_json(findings.remedy),
        "pool": {
            **dataclasses.asdict(findings.pool),
            "rows": len(findings.lengths.inputs),
            "lengths": findings.lengths.source,
        },
        "assumptions": dataclasses.asdict(findings.assumptions),
    }


def _remedy_as_json(remedy: Remedy) -> dict[str, Any]:
    return {
        "settings": remedy.settings,
        "programs": [dataclasses.asdict(answer) for answer in remedy.answers],
        "tried": remedy.tried,
    }


def _heading(findings: Findings) -> str:
    topology = findings.topology
    parameters = parameter_count(findings.programs[0].request.architecture)
    hosts = f"{topology.num_hosts} hosts" if topology.num_hosts > 1 else "1 host"
    return (
        f"{findings.student} ({parameters / 1e9:.1f} billion parameters) on {topology.name}: "
        f"{topology.num_devices} x {topology.chip.name}, {hosts}, {gib(topology.memory_bytes)} GiB usable per device"
    )


def _program(program: Finding, findings: Findings) -> str:
    request, answer, memory = program.request, program.answer, program.answer.memory
    rows = [
        ("parameters", memory.parameters, f"{_split(answer)}, {request.dtype}"),
        ("other arguments", memory.arguments - memory.parameters, "rows of tokens, and padding by the compiler"),
        ("output", memory.output, ""),
        ("temporary", memory.temporary, _NOTES_ON_ATTENTION.get(answer.attention, "")),
        ("program", memory.code, ""),
        ("total", memory.total, f"of {gib(memory.available)} usable"),
    ]
    return "\n".join(
        [
            f"{request.step}: {answer.rows_per_device} x {answer.length:,} tokens per device",
            f"  mesh {mesh_text(answer)}; attention {answer.attention}; compiled by {answer.compiler} in "
            f"{answer.compile_seconds:.0f} s",
            "",
            *table("memory per device, GiB", [(name, gib(size), note) for name, size, note in rows]),
            "",
            *table("one step, per device", _costs(program, findings)),
            "",
            _verdict(program),
        ]
    )


def _costs(program: Finding, findings: Findings) -> list[tuple[str, str, str]]:
    cost, time, chip = program.cost, program.time, findings.topology.chip
    shares = findings.assumptions
    bandwidth = cost.sent_bytes / (time.network * shares.network) if time.network else 0.0
    sent = [
        (f"  {item.kind} over {item.axes}", gib(item.bytes_sent), f"GiB, {item.times} times")
        for item in (program.answer.collectives)
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
            gib(cost.memory_bytes),
            f"GiB      {time.memory:.2f} {at(shares.memory)} {chip.memory_bandwidth / 1e9:,.0f} GB/s (estimate)",
        ),
        (
            "sent to others",
            gib(cost.sent_bytes),
            f"GiB      {time.network:.2f} {at(shares.network)} {bandwidth / 1e9:,.0f} GB/s" if bandwidth else "GiB",
        ),
        *sent,
        ("longest of these", f"{time.seconds:.2f}", f"s        {time.slowest}"),
    ]


def _verdict(program: Finding) -> str:
    memory = program.answer.memory
    if memory.fits:
        return f"  FITS, {gib(memory.available - memory.total)} GiB to spare"
    return f"  DOES NOT FIT, by {(memory.total - memory.available) / GIB:.2f} GiB"


def _remedy(remedy: Remedy) -> str:
    tried = [f"    tried, does not fit: {settings}" for settings in remedy.tried]
    if not remedy.found:
        return "\n".join(["No setting makes it fit; it needs devices with more memory, or more of them.", *tried])
    total = gib(max(answer.memory.total for answer in remedy.answers))
    return "\n".join([f"This was compiled and fits, with {total} GiB:", f"    {remedy.settings}", *tried])


def _pool(findings: Findings) -> str:
    pool, shares, lengths = findings.pool, findings.assumptions, findings.lengths
    condition = "" if findings.fits else " once it fits"
    return "\n".join(
        [
            f"The pool: about {_duration(pool.hours)}{condition}; {pool.slowest} decides",
            f"  work         {len(lengths.inputs):,} rows, {pool.tokens:,} tokens, {pool.padding:.1%} padding, "
            f"{pool.steps:,} steps of {pool.shapes} shapes",
            f"  lengths      {lengths.source}",
            f"  assumptions  {shares.compute:.0%} of the peak rate, {shares.memory:.0%} of memory and "
            f"{shares.network:.0%} of network bandwidth; the slowest hides the others;",
            "               loading, compiling and the host's work are not in it",
        ]
    )


def table(title: str, rows: Sequence[tuple[str, str, str]]) -> list[str]:
    return [f"  {title}", *(f"    {name:<32}{value:>10}  {note}".rstrip() for name, value, note in rows)]


def _split(answer: CompileAnswer) -> str:
    if not answer.parameter_axes:
        return "whole on every device"
    how = {"data": "gathered layer by layer over data", "tensor": "split over tensor"}
    return " and ".join(how[axis] for axis in answer.parameter_axes)


def mesh_text(answer: CompileAnswer) -> str:
    shape = f"data={answer.data} x tensor={answer.tensor}"
    return f"{shape} in each of {answer.meshes} hosts" if answer.meshes > 1 else shape


def gib(size: float) -> str:
    return f"{size / GIB:,.1f}"


def _duration(hours: float) -> str:
    return f"{hours * 60:.1f} min" if hours < 2 else f"{hours:,.1f} h"
