"""Which software made an experiment's results, by the manifests of its tasks."""

from collections.abc import Iterator, Mapping, Sequence


def software_of(ran: Sequence[tuple[str, Mapping[str, str]]]) -> Iterator[tuple[str, str]]:
    """Each package and its version; a row for every version with the tasks that ran under it, where they differ.

    Args:
      ran: name of a task, and package -> version there.
    """
    tasks = [task for task, _ in ran]
    for package in dict.fromkeys(package for _, versions in ran for package in versions):
        by_version: dict[str, list[str]] = {}
        for task, versions in ran:
            by_version.setdefault(versions.get(package, "none recorded"), []).append(task)
        for version, of_version in by_version.items():
            where = "" if len(by_version) == 1 else f" in {', '.join(_short(of_version, tasks))}"
            yield package + where, version


def _short(some: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """Stages all of whose tasks are among `some`, and the names of the other tasks of `some`."""
    divided = {_stage(task) for task in tasks if task not in some}
    return list(dict.fromkeys(task if _stage(task) in divided else _stage(task) for task in some))


def _stage(task: str) -> str:
    return task.partition("/")[0]
