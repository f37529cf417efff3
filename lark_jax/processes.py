"""The processes of one run: who this one is, and how they wait for each other.

A process drives the devices of its own host. What processes share is the file system.
"""

import dataclasses

import jax
from jax.experimental import multihost_utils


@dataclasses.dataclass(frozen=True)
class Share:
    """Part `index` of `count`: what one of several workers that need not talk to each other takes of a list of work."""

    index: int = 0
    count: int = 1

    def takes(self, item: int) -> bool:
        return item % self.count == self.index


def is_first() -> bool:
    """Whether this process writes what is written once: manifests, assembled tables."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has come here; at once where there is only one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
