"""Ordered prefetch: in order, within its budget, errors reach the caller, no thread is left."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lark_jax.runtime.prefetch import THREAD_NAME, prefetch


def no_thread_is_left() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


class Gauge:
    """Counts what is fetched or being fetched and not yet taken; its peak."""

    def __init__(self) -> None:
        self.held = self.peak = 0
        self.lock = threading.Lock()

    def add(self, amount: int) -> None:
        with self.lock:
            self.held += amount
            self.peak = max(self.peak, self.held)


@given(st.lists(st.integers(1, 9), max_size=40), st.integers(1, 30), st.integers(1, 5))
@settings(max_examples=30)
def test_items_come_in_order_and_within_the_budget(sizes, budget, num_threads):
    gauge, items = Gauge(), list(enumerate(sizes))

    def fetch(item):
        gauge.add(item[1])
        return item[0] * 10

    taken = []
    for item, fetched in prefetch(items, fetch, size=lambda item: item[1], budget=budget, num_threads=num_threads):
        gauge.add(-item[1])
        taken.append((item, fetched))
    assert taken == [(item, item[0] * 10) for item in items]
    # The caller's current item has left the window and is counted here all the same.
    assert gauge.peak <= max([budget, *sizes]) + max(sizes, default=0)
    assert no_thread_is_left()


def test_items_are_fetched_at_the_same_time_while_one_is_used():
    meeting = threading.Barrier(4, timeout=20)
    results = prefetch(range(4), lambda item: (item, meeting.wait())[0], budget=4, num_threads=4)
    assert [fetched for _, fetched in results] == [0, 1, 2, 3]


def test_a_budget_of_two_computes_the_next_item_while_the_caller_has_the_current_one_and_none_after_it():
    started = [threading.Event() for _ in range(4)]
    results = prefetch(range(4), lambda item: started[item].set(), budget=2)
    assert next(results)[0] == 0
    assert started[1].wait(timeout=10)
    assert not started[2].wait(timeout=0.1)
    assert next(results)[0] == 1
    assert started[2].wait(timeout=10)


def test_an_error_comes_out_when_its_item_is_due_and_cancels_the_rest():
    started, taken = [], []

    def fetch(item):
        started.append(item)
        time.sleep(0.001)
        if item == 3:
            raise OSError("gone")
        return item

    results = prefetch(range(1_000), fetch, budget=8, num_threads=2)
    with pytest.raises(OSError, match="gone"):
        taken.extend(item for item, _ in results)
    assert taken == [0, 1, 2]
    assert max(started) < 20
    assert no_thread_is_left()


def test_a_caller_that_stops_early_leaves_no_threads():
    results = prefetch(range(1_000), lambda item: item, budget=8, num_threads=2)
    assert next(results) == (0, 0)
    results.close()
    assert no_thread_is_left()
