"""Work on the next item while the present one is in use."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def computed_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`function` of each item, in order; that of the next item is computed in a thread while the caller has this one.

    An exception of `function` is raised here when its item's turn comes. At most two results exist at a time.
    """
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead")
    try:
        present: Future[Result] | None = None
        for item in items:
            following = executor.submit(function, item)
            if present is not None:
                yield present.result()
            present = following
        if present is not None:
            yield present.result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
