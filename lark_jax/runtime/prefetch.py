"""Ordered prefetch: threads compute the next items while the caller uses the current one, within a memory budget."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Fetched = TypeVar("Fetched")

THREAD_NAME = "prefetch"


def prefetch(
    items: Iterable[Item],
    fetch: Callable[[Item], Fetched],
    *,
    budget: int,
    size: Callable[[Item], int] = lambda _: 1,
    num_threads: int = 1,
) -> Generator[tuple[Item, Fetched], None, None]:
    """Yields (item, fetch(item)) in the order of `items`.

    Threads start items in that order. The items that have been started and that the caller has not finished with are
    at most `budget` in total `size`, or a single item that is larger. The first error of `fetch` is raised when its
    item is due, and cancels the rest. Closing the generator waits for the items that are being fetched.
    """
    waiting: deque[tuple[Item, int, Future[Fetched]]] = deque()
    held = 0
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix=THREAD_NAME)
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
