"""Work ahead: in order, one item ahead and no more, errors reach the caller, nothing hangs."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark_jax.errors import TemplateError
from lark_jax.scoring.ahead import computed_ahead


@given(st.lists(st.integers()))
def test_results_come_in_order(items):
    assert list(computed_ahead(lambda item: item * 2, items)) == [item * 2 for item in items]


def test_the_next_item_is_computed_while_the_caller_has_the_present_one_and_none_after_it():
    started = [threading.Event() for _ in range(4)]

    def start(item: int) -> int:
        started[item].set()
        return item

    results = computed_ahead(start, range(4))
    assert next(results) == 0
    assert started[1].wait(timeout=10)
    assert not started[2].wait(timeout=0.1)
    assert next(results) == 1
    assert started[2].wait(timeout=10)


def test_it_runs_in_another_thread():
    (name,) = computed_ahead(lambda _: threading.current_thread().name, [0])
    assert name != threading.current_thread().name


def test_an_error_reaches_the_caller_as_it_was_raised_and_after_what_came_before():
    def fail_at_two(item: int) -> int:
        if item == 2:
            raise TemplateError("record p/c: one line")
        return item

    results = computed_ahead(fail_at_two, range(5))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(TemplateError, match=r"^record p/c: one line$"):
        next(results)
    assert list(results) == []


def test_a_caller_that_stops_early_waits_for_nobody():
    release = threading.Event()
    results = computed_ahead(lambda item: item if item == 0 else release.wait(30), range(3))
    assert next(results) == 0
    results.close()  # would wait 30 s, were it to wait for item 1
    assert not release.is_set()
    release.set()
