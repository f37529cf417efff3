"""What holds for the repository as a whole: layers, module length, dependencies, notes, documented commands."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lark_jax"
SOURCES = sorted(path for folder in ("lark_jax", "scripts", "configs") for path in (ROOT / folder).rglob("*.py"))
MODULES = [path for path in SOURCES if PACKAGE in path.parents]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "third_party_notes").glob("*.md")])

WORKER = PACKAGE / "evaluation" / "worker"  # programs for another virtualenv: siblings import each other by bare name
WORKER_SIBLINGS = {path.stem for path in WORKER.glob("*.py")}
WITHOUT_JAX = ("errors", "files", "config", "pool.records", "pool.readers", "rendering.chat", "evaluation", "report")
OPTIONAL = (
    "torch",
    "vllm",
    "tensorboardX",
    "wandb",
)  # extras: imported where they are used, never at the top of a module
IMPORT_NAMES = {"absl-py": "absl", "math-verify": "math_verify", "orbax-checkpoint": "orbax"}


@dataclass(frozen=True)
class Import:
    module: str  # dotted, absolute
    line: int
    at_top: bool  # executed when the importing module is


def dotted_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def imports_of(path: Path) -> tuple[Import, ...]:
    return tuple(_imports(tree_of(path), at_top=True))


def _imports(node: ast.AST, at_top: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, at_top) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: relative import"
            assert child.module is not None
            yield Import(child.module, child.lineno, at_top)
            yield from (Import(f"{child.module}.{alias.name}", child.lineno, at_top) for alias in child.names)
        else:
            inside_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, at_top and not inside_function)


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirement_name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9_.\-]+(\[[a-z0-9,]+\])?", requirement)
    assert match
    return match.group()


@pytest.mark.parametrize("prefix", WITHOUT_JAX)
def test_these_modules_are_imported_without_jax(prefix: str) -> None:
    by_name = {dotted_name(path): path for path in MODULES}
    start = [name for name in by_name if f"{name}.".startswith(f"lark_jax.{prefix}.")]
    assert start
    reached: set[str] = set()
    waiting = start
    while waiting:
        name = waiting.pop()
        if name in reached or name not in by_name:
            continue
        reached.add(name)
        found = [item for item in imports_of(by_name[name]) if item.at_top]
        for item in found:
            assert item.module.split(".")[0] not in ("jax", "jaxlib", "flax", "optax", "orbax"), (
                f"{prefix} reaches {name}, which imports {item.module}"
            )
        packages = [parent for item in found for parent in _with_parents(item.module)]
        waiting += [*packages, *_with_parents(name)]


def _with_parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


@pytest.mark.parametrize("path", SOURCES, ids=dotted_name)
def test_modules_are_short_and_say_what_they_are(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 400
    is_bare_package = path.name == "__init__.py" and not tree_of(path).body
    assert is_bare_package or ast.get_docstring(tree_of(path))


def test_nothing_is_left_open() -> None:
    marks = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK")) + r")\b")
    files = [*SOURCES, *DOCUMENTS, *(ROOT / "tests").rglob("*.py"), ROOT / "Makefile", ROOT / "pyproject.toml"]
    found = [f"{path.relative_to(ROOT)}" for path in files if marks.search(path.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize("path", SOURCES, ids=dotted_name)
def test_no_foreign_code_is_run(path: Path) -> None:
    for item in imports_of(path):
        assert item.module.split(".")[0] not in ("pickle", "dill", "cloudpickle", "joblib"), f"line {item.line}"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            trusting = [
                word.arg for word in node.keywords if word.arg in ("trust_remote_code", "allow_pickle", "shell")
            ]
            assert trusting == [], f"line {node.lineno}: {trusting}"
            assert not (isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec")), f"line {node.lineno}"
            assert ast.unparse(node.func) not in ("torch.load", "os.system"), f"line {node.lineno}"


def test_the_package_imports_exactly_what_it_declares() -> None:
    declared = {IMPORT_NAMES.get(name, name) for name in map(requirement_name, project()["dependencies"])}
    imported = {item.module.split(".")[0] for path in MODULES for item in imports_of(path)}
    foreign = imported - set(sys.stdlib_module_names) - {"lark_jax"} - WORKER_SIBLINGS
    assert foreign - declared - set(OPTIONAL) == set()
    assert declared - foreign == set(), "declared, but nothing imports it"


@pytest.mark.parametrize("path", sorted(WORKER.glob("*.py")), ids=dotted_name)
def test_the_worker_needs_nothing_but_an_engine(path: Path) -> None:
    allowed = {*sys.stdlib_module_names, *WORKER_SIBLINGS, "torch", "transformers", "vllm"}
    assert {item.module.split(".")[0] for item in imports_of(path)} <= allowed


@pytest.mark.parametrize("path", [path for path in MODULES if WORKER not in path.parents], ids=dotted_name)
def test_extras_are_imported_only_where_they_are_used(path: Path) -> None:
    at_top = [item for item in imports_of(path) if item.at_top and item.module.split(".")[0] in OPTIONAL]
    assert at_top == []


def test_every_dependency_has_its_row_with_the_declared_range() -> None:
    text = (ROOT / "third_party_notes" / "dependencies.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    by_package = {row[0]: row for row in rows}
    assert len(by_package) == len(rows) - 1  # the two tables share their header cell
    extras = project()["optional-dependencies"]
    requirements = [*project()["dependencies"], *(item for items in extras.values() for item in items)]
    for requirement in requirements:
        name = requirement_name(requirement)
        assert name in by_package, f"{name} has no row in dependencies.md"
        assert all(by_package[name])
        bounds = requirement.removeprefix(name)
        assert not bounds or bounds in by_package[name], f"{name}: the row does not say {bounds}"
    assert set(by_package) - {"package"} == set(map(requirement_name, requirements))


def test_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert project()["license"] == "Apache-2.0"


def test_files_that_modules_read_are_installed_with_them() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = setuptools["package-data"]["lark_jax"]
    installed = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    others = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others == installed


def test_every_folder_with_modules_is_a_package() -> None:
    assert [path.parent.name for path in MODULES if not (path.parent / "__init__.py").exists()] == []


def test_test_files_have_unique_names() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_readme_exists() -> None:
    assert (ROOT / "README.md").is_file()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documented_commands_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^(?: {4}|\$ |`)make (?:[A-Z]+=\S+ )?([a-z][a-z-]*)", text, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"{document.name}: make {target}"
    for module in re.findall(r"python3? -m (lark_jax(?:\.\w+)+)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"{document.name}: {module}"
    for path in re.findall(r"\b(?:configs|scripts|tests|docs|third_party_notes|lark_jax)/[\w/.-]*\.\w+", text):
        assert (ROOT / path.rstrip(".")).is_file(), f"{document.name}: {path}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_within_the_repository_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8"))
    local = [target for target in targets if not target.startswith(("http://", "https://", "mailto:"))]
    assert [target for target in local if not (document.parent / target).exists()] == []
