"""The roofline: proportions that must hold whatever the constants are."""

import pytest
from budget_cases import score_request
from compiler_answers import answer_with
from hypothesis import given
from hypothesis import strategies as st

from lark_jax.preflight.collectives import Collective
from lark_jax.preflight.cost import Assumptions, pool_time, step_cost, step_time
from lark_jax.preflight.lengths import Steps
from lark_jax.preflight.requests import CompileAnswer, Memory
from lark_jax.preflight.topologies import parse_topology
from lark_jax.students.flops import forward_flops

ARCHITECTURE = score_request("qwen2.5-7b", "v5p-8").architecture
LENGTH, SHORT = 8_192, 128


def answer_sending(sent: int = 0, sent_short: int = 0, **changes: int) -> CompileAnswer:
    fields = {"data": 4, "tensor": 1, "rows_per_device": 4, "length": LENGTH, "short_length": SHORT, **changes}
    return answer_with(
        Memory(15 * 10**9, 15 * 10**9, 0, 10**9, 0, 16 * 10**9, 90 * 10**9),
        collectives=(Collective("psum", "tensor", 1, sent),),
        short_collectives=(Collective("psum", "tensor", 1, sent_short),),
        **fields,
    )


def test_compute_is_the_students_flops_shared_over_tensor() -> None:
    cost = step_cost(ARCHITECTURE, answer_sending(), 4, LENGTH, 2)
    assert cost.flops == 4 * forward_flops(ARCHITECTURE, LENGTH)
    halved = step_cost(ARCHITECTURE, answer_sending(tensor=2), 4, LENGTH, 2)
    assert halved.flops == cost.flops / 2
    assert cost.memory_bytes / 2 < halved.memory_bytes < cost.memory_bytes  # weights and the residual stream stay


def test_memory_traffic_has_at_least_the_weights_and_the_logits() -> None:
    one_token = step_cost(ARCHITECTURE, answer_sending(), 1, 1, 2).memory_bytes
    assert one_token == pytest.approx(15 * 10**9, rel=0.01)
    many = step_cost(ARCHITECTURE, answer_sending(), 4, LENGTH, 2).memory_bytes
    assert many > one_token + 4 * LENGTH * ARCHITECTURE.vocab_size * 8


@given(st.integers(0, 10**9), st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 40_000))
def test_sent_bytes_are_a_constant_and_a_part_per_token(fixed: int, per_token: int, rows: int, length: int) -> None:
    answer = answer_sending(sent=fixed + per_token * 4 * LENGTH, sent_short=fixed + per_token * 4 * SHORT)
    sent = step_cost(ARCHITECTURE, answer, rows, length, 2).sent_bytes
    assert sent == pytest.approx(fixed + per_token * rows * length, rel=1e-9, abs=1.0)


def test_the_slowest_resource_counts_and_is_named() -> None:
    chip = parse_topology("h100:16").chip
    cost = step_cost(ARCHITECTURE, answer_sending(sent=10**13, sent_short=10**13), 4, LENGTH, 2)
    inside = step_time(cost, chip, across_hosts=False, assumptions=Assumptions())
    across = step_time(cost, chip, across_hosts=True, assumptions=Assumptions())
    assert inside.slowest == across.slowest == "network"
    assert inside.seconds == inside.network == 10**13 / (0.7 * 450e9)
    assert across.network == pytest.approx(9 * inside.network)
    assert inside.compute == cost.flops / (0.5 * 989e12)


def test_hosts_that_score_side_by_side_share_the_time() -> None:
    steps = (Steps(1, 32_768, 80), Steps(4, 8_192, 800))

    def hours(meshes: int) -> float:
        return pool_time(
            steps,
            tokens=80 * 4 * 32_768 + 800 * 16 * 8_192,
            architecture=ARCHITECTURE,
            answer=answer_sending(meshes=meshes),
            chip=parse_topology("v5p-8").chip,
            across_hosts=False,
            bytes_per_value=2,
            assumptions=Assumptions(),
        ).hours

    assert hours(8) == pytest.approx(hours(1) / 8)
