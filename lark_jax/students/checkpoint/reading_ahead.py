"""Fetching a list of items with threads, in order, ahead of the one who uses them, within a bound on memory."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Fetched = TypeVar("Fetched")


def read_ahead(
    items: Iterable[Item],
    fetch: Callable[[Item], Fetched],
    *,
    size: Callable[[Item], int],
    budget: int,
    num_threads: int,
) -> Generator[tuple[Item, Fetched], None, None]:
    """Yields every item with what `fetch` made of it, in the order of `items`.

    Threads start items in that order. Those that are fetched or being fetched, and not yet yielded, have a `size` of
    `budget` together, or are a single one that is larger. The first error of `fetch` is raised, and ends the rest.
    """
    waiting: deque[tuple[Item, int, Future[Fetched]]] = deque()
    held = 0
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="read_ahead")
    try:
        for item in items:
            while waiting and held + size(item) > budget:
                first, first_size, future = waiting.popleft()
                yield first, future.result()
                held -= first_size
            waiting.append((item, size(item), pool.submit(fetch, item)))
            held += size(item)
        while waiting:
            first, _, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
