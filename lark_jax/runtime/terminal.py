"""Messages to the user: narration, warnings, and progress with ETA, all on stderr."""

import sys

from tqdm import tqdm

from lark_jax.runtime import processes


def say(message: str) -> None:
    """Prints a line on stderr, in the first process only; tables and paths that a user may pipe go to stdout."""
    if processes.is_first():
        print(f"[lark_jax] {message}", file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Prints one line in every process, with the process's name."""
    print(f"[{' '.join(['lark_jax', processes.label()]).strip()}] {message}", file=sys.stderr, flush=True)


def progress_bar(*, what: str, total: int, unit: str, initial: int = 0, delay: float = 0.0) -> tqdm:
    """A bar on stderr, in the first process only, shown after `delay` seconds; in files redrawn every 10 s at most."""
    return tqdm(
        desc=what,
        total=total,
        unit=f" {unit}",
        unit_scale=unit in ("token", "B"),
        initial=initial,
        delay=delay,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
        file=sys.stderr,
        disable=not processes.is_first(),
    )
