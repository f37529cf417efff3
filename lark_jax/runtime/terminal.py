"""What a run says to the user: narration, warnings, and progress with ETA, all on stderr."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from lark_jax.runtime import processes

Item = TypeVar("Item")


def say(message: str) -> None:
    """One line of narration on stderr, by the first process; tables and paths that a user may pipe go to stdout."""
    if processes.is_first():
        print(f"[lark_jax] {message}", file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """What every process says for itself, with its name."""
    print(f"[{' '.join(['lark_jax', processes.label()]).strip()}] {message}", file=sys.stderr, flush=True)


def progress_bar(*, what: str, total: int, unit: str, initial: int = 0, delay: float = 0.0) -> tqdm:
    """A bar on stderr, of the first process alone, from `delay` seconds on.

    Where stderr is a file, it is redrawn every 10 s at most.
    """
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        desc=what,
        total=total,
        unit=f" {unit}",
        unit_scale=unit in ("token", "B"),
        initial=initial,
        delay=delay,
        mininterval=interval,
        file=sys.stderr,
        disable=not processes.is_first(),
    )


def progress(items: Iterable[Item], *, what: str, total: int, unit: str) -> Iterator[Item]:
    """Iterates over `items` under a progress bar."""
    with progress_bar(what=what, total=total, unit=unit) as bar:
        for item in items:
            yield item
            bar.update()
