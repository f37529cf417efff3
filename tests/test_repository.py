"""What holds for the repository as a whole, where no linter checks it: length of modules, dependencies, documents.

Layers, modules without JAX, extras at the top of a module and unsafe calls are contracts of import-linter and rules of
ruff, in pyproject.toml. Each test here lists all offenders at once.
"""

import ast
import dataclasses
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lark_jax.config import PoolConfig

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lark_jax"
SOURCES = sorted(path for folder in ("lark_jax", "scripts", "configs") for path in (ROOT / folder).rglob("*.py"))
MODULES = [path for path in SOURCES if PACKAGE in path.parents]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(path for folder in ("docs", "third_party_notes") for path in (ROOT / folder).rglob("*.md"))]
)

WORKER = PACKAGE / "evaluation" / "worker"  # programs for another virtualenv: siblings import each other by bare name
WORKER_SIBLINGS = {path.stem for path in WORKER.glob("*.py")}
EXTRAS = {"torch", "vllm", "tensorboardX", "wandb"}
IMPORT_NAMES = {"absl-py": "absl", "math-verify": "math_verify", "orbax-checkpoint": "orbax"}
README_WORDS = 1_300


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def place(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(read(path), str(path))


def imported_packages(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def pyproject() -> dict:
    return tomllib.loads(read(ROOT / "pyproject.toml"))


def requirement_name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9_.\-]+(\[[a-z0-9,]+\])?", requirement)
    assert match
    return match.group()


# Code


def test_modules_are_short() -> None:
    assert [place(path) for path in SOURCES if len(read(path).splitlines()) >= 400] == []


def test_modules_have_docstrings() -> None:
    written = [path for path in SOURCES if path.name != "__init__.py" or tree_of(path).body]
    assert [place(path) for path in written if not ast.get_docstring(tree_of(path))] == []


def test_nothing_is_left_open() -> None:
    marks = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK")) + r")\b")
    files = [*SOURCES, *DOCUMENTS, *TESTS, ROOT / "Makefile", ROOT / "pyproject.toml"]
    assert [place(path) for path in files if marks.search(read(path))] == []


def test_no_merge_conflict_is_left() -> None:
    markers = re.compile(r"^(<{7}|>{7}) ", flags=re.MULTILINE)
    scripts = [*(ROOT / "scripts").glob("*.sh"), ROOT / "Makefile", ROOT / "pyproject.toml"]
    assert [place(path) for path in (*SOURCES, *DOCUMENTS, *TESTS, *scripts) if markers.search(read(path))] == []


def test_no_call_trusts_foreign_code() -> None:
    found = [
        f"{place(path)}:{node.lineno}: {word.arg}"
        for path in SOURCES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call)
        for word in node.keywords
        if word.arg in ("trust_remote_code", "allow_pickle")
    ]
    assert found == []


def test_the_package_imports_exactly_what_it_declares() -> None:
    declared = {IMPORT_NAMES.get(name, name) for name in map(requirement_name, pyproject()["project"]["dependencies"])}
    imported = set().union(*map(imported_packages, MODULES))
    foreign = imported - set(sys.stdlib_module_names) - {"lark_jax"} - WORKER_SIBLINGS
    assert foreign - declared - EXTRAS == set(), "imported, but not declared"
    assert declared - foreign == set(), "declared, but nothing imports it"


def test_the_worker_needs_nothing_but_an_engine() -> None:
    allowed = {*sys.stdlib_module_names, *WORKER_SIBLINGS, "torch", "transformers", "vllm"}
    found = {path.name: imported_packages(path) - allowed for path in WORKER.glob("*.py")}
    assert {name: packages for name, packages in found.items() if packages} == {}


# Package


def test_every_dependency_has_its_row_with_the_declared_range() -> None:
    lines = read(ROOT / "third_party_notes" / "dependencies.md").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    by_package = {row[0]: row for row in rows}
    assert len(by_package) == len(rows) - 1  # the two tables share their header cell
    assert [name for name, row in by_package.items() if not all(row)] == []
    project = pyproject()["project"]
    extras = project["optional-dependencies"].values()
    requirements = [*project["dependencies"], *(item for items in extras for item in items)]
    assert set(by_package) - {"package"} == set(map(requirement_name, requirements))
    bounds = {requirement_name(item): item.removeprefix(requirement_name(item)) for item in requirements}
    assert [f"{name}{bound}" for name, bound in bounds.items() if bound and bound not in by_package[name]] == []


def test_licence_is_apache_2() -> None:
    text = read(ROOT / "LICENSE")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert pyproject()["project"]["license"] == "Apache-2.0"


def test_files_that_modules_read_are_installed_with_them() -> None:
    patterns = pyproject()["tool"]["setuptools"]["package-data"]["lark_jax"]
    installed = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    others = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others == installed


# Documents


def test_the_readme_is_short() -> None:
    assert len(read(ROOT / "README.md").split()) <= README_WORDS


def test_documented_commands_exist() -> None:
    makefile = read(ROOT / "Makefile")
    found = []
    for document in DOCUMENTS:
        text = read(document)
        for target in re.findall(r"^(?: {4}|\$ |`)make (?:[A-Z]+=\S+ )?([a-z][a-z-]*)", text, flags=re.MULTILINE):
            if not re.search(rf"^{target}:", makefile, flags=re.MULTILINE):
                found.append(f"{place(document)}: make {target}")
        for module in re.findall(r"python3? -m (lark_jax(?:\.\w+)+)", text):
            path = ROOT / module.replace(".", "/")
            if not (path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()):
                found.append(f"{place(document)}: {module}")
    assert found == []


def test_documented_paths_exist() -> None:
    """From the root, or within backticks from lark_jax/ or tests/, as in the paper map."""
    from_root = re.compile(r"\b(?:configs|scripts|tests|docs|third_party_notes|lark_jax)/[\w/.-]*\.\w+")
    from_folder = re.compile(rf"`((?:{'|'.join(_folders(PACKAGE))})/[\w/]+\.(?:py|toml)|test_\w+\.py)")
    found = []
    for document in DOCUMENTS:
        text = read(document)
        paths = [(path.rstrip("."), (ROOT,)) for path in from_root.findall(text)]
        paths += [(path, (PACKAGE, ROOT / "tests")) for path in from_folder.findall(text)]
        found += [f"{place(document)}: {path}" for path, roots in paths if not any((r / path).is_file() for r in roots)]
    assert found == []


def _folders(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if (path / "__init__.py").is_file()]


def test_documented_names_exist() -> None:
    """Modules, functions and classes such as `selection.learnability.lark_scores`, below lark_jax."""
    packages = set(_folders(PACKAGE)) - {"config"}
    fields = {"pool": {field.name for field in dataclasses.fields(PoolConfig)}}
    found = [
        f"{place(document)}: {name}"
        for document in DOCUMENTS
        for name in re.findall(r"`(?:lark_jax\.)?([a-z_]+(?:\.\w+)+)`?", read(document))
        if (parts := name.split("."))[0] in packages
        and parts[1] not in fields.get(parts[0], ())  # a field of the configuration: pool.path
        and parts[-1] not in ("json", "jsonl", "parquet", "md")
        and not _exists(parts)
    ]
    assert found == []


def _exists(parts: list[str]) -> bool:
    path = PACKAGE
    for index, part in enumerate(parts):
        if (path / part).is_dir():
            path = path / part
        elif (path / f"{part}.py").is_file():
            return len(parts) <= index + 1 or parts[index + 1] in set(_bound(path / f"{part}.py"))
        else:
            return part in set(_bound(path / "__init__.py"))
    return True


def _bound(path: Path) -> Iterator[str]:
    """Names bound at the top of a module."""
    for node in tree_of(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.ImportFrom | ast.Import):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def test_the_documented_layers_are_those_that_are_checked() -> None:
    (layers,) = (contract for contract in pyproject()["tool"]["importlinter"]["contracts"] if "layers" in contract)
    checked = [set(layer.split(" : ")) for layer in layers["layers"]]
    table = read(ROOT / "docs" / "architecture.md").partition("| layer |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert [set(re.findall(r"`(\w+)`", names)) for names in rows] == checked


def test_links_within_the_repository_lead_somewhere() -> None:
    found = []
    for document in DOCUMENTS:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?[^)]*\)", read(document)):
            if target.startswith(("http://", "https://", "mailto:")):
                continue
            path = document.parent / target if target else document
            if not path.exists() or (anchor and anchor not in _anchors(path)):
                found.append(f"{place(document)}: {target}#{anchor}")
    assert found == []


def _anchors(document: Path) -> set[str]:
    """Anchors of a document's headings, as Markdown renderers make them."""
    headings = re.findall(r"^#+ (.+)$", read(document), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
