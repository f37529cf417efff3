import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lark_jax.students.checkpoint.reading_ahead import read_ahead


def no_reader_is_left():
    return not [thread for thread in threading.enumerate() if thread.name.startswith("read_ahead")]


class Gauge:
    """Counts what is fetched or being fetched and not yet taken; its peak."""

    def __init__(self):
        self.held = self.peak = 0
        self.lock = threading.Lock()

    def add(self, amount):
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
    for item, fetched in read_ahead(items, fetch, size=lambda item: item[1], budget=budget, num_threads=num_threads):
        gauge.add(-item[1])
        taken.append((item, fetched))
    assert taken == [(item, item[0] * 10) for item in items]
    # The item in the taker's hands has left the window and is counted here all the same.
    assert gauge.peak <= max([budget, *sizes]) + max(sizes, default=0)
    assert no_reader_is_left()


def test_items_are_fetched_at_the_same_time_while_one_is_used():
    meeting = threading.Barrier(4, timeout=20)
    results = read_ahead(range(4), lambda item: (item, meeting.wait())[0], size=lambda _: 1, budget=4, num_threads=4)
    assert [fetched for _, fetched in results] == [0, 1, 2, 3]


def test_an_error_comes_out_and_ends_the_rest():
    started = []

    def fetch(item):
        started.append(item)
        time.sleep(0.001)
        if item == 3:
            raise OSError("gone")
        return item

    with pytest.raises(OSError, match="gone"):
        list(read_ahead(range(1_000), fetch, size=lambda _: 1, budget=8, num_threads=2))
    assert max(started) < 20
    assert no_reader_is_left()


def test_a_taker_who_leaves_early_leaves_no_threads():
    results = read_ahead(range(1_000), lambda item: item, size=lambda _: 1, budget=8, num_threads=2)
    assert next(results) == (0, 0)
    results.close()
    assert no_reader_is_left()
