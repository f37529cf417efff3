"""The experiment's pool, as every stage reads it."""

from typing import Any

from lark_jax.config import Experiment
from lark_jax.errors import PoolError
from lark_jax.pool import Pool, files_read, load_pool
from lark_jax.pool.readers import source_size
from lark_jax.pool.sources import local_source
from lark_jax.runtime import terminal
from lark_jax.stages.layout import Layout

SECONDS_WITHOUT_A_BAR = 10.0


def pool_inputs(experiment: Experiment, layout: Layout) -> dict[str, Any]:
    """The inputs of a stage that reads the pool: the bytes of its files, and the settings of reading.

    Files in the folder that are not part of the pool do not count.
    """
    return {
        "pool": layout.hashes.of(local_source(experiment.pool.path), PoolError, files_read(experiment.pool)),
        "reading": experiment.pool.reading(),
    }


def open_pool(experiment: Experiment) -> Pool:
    """Reads the pool, with a progress bar if it takes long."""
    with terminal.progress_bar(
        what="read the pool", total=source_size(experiment.pool), unit="B", delay=SECONDS_WITHOUT_A_BAR
    ) as bar:
        return load_pool(experiment.pool, bar.update)


def say_what_is_left_out(pool: Pool) -> None:
    """One line each about files that are not read, records that are filtered, and repeated answers."""
    if pool.files_left_out:
        terminal.say(f"not part of the pool: {', '.join(pool.files_left_out)}")
    if pool.filtered:
        terminal.say(
            f"left out: {len(pool.filtered):,} records, listed in the manifest; first: {pool.filtered[0].reason}"
        )
    if pool.duplicates:
        first = pool.duplicates[0]
        terminal.say(
            f"{len(pool.duplicates):,} answers repeat another candidate of their problem word for word, first "
            f"{first.location} and {first.earlier}; see config.pool.duplicate_answers"
        )
