"""The structure of the package and of its tests, read from their imports."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import ase_bptt

ROOT = Path(ase_bptt.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if "data" not in path.relative_to(ROOT).parts)
MODULES = {".".join((ROOT.name, *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
           for path in FILES}  # fmt: skip


def statements(node: ast.AST) -> Iterator[ast.stmt]:
    """All statements, those within functions, too, but for what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.stmt):
            yield child
        yield from statements(child)


def imported(module: str) -> set[str]:
    """The modules of the package that this one imports."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in statements(ast.parse(MODULES[module].read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], *(node.module or "").split()])
        for alias in node.names:
            found.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base)
    return found - {ROOT.name, module}


TESTS = sorted(Path(__file__).parent.rglob("*.py"))
IMPORTS = {module: imported(module) for module in MODULES if module != ROOT.name}


def room(module: str) -> str | None:
    """The folder that a module stands in; None at the top level."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (ROOT / parts[1]).is_dir() else None


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """One circle of arrows, or none."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for following in sorted(arrows.get(node, ())):
            if found := walk(following, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(arrows) if (found := walk(node, []))), [])


def test_no_circle_of_files():
    assert circle(IMPORTS) == []


def test_no_circle_of_folders():
    arrows = defaultdict(set)
    for module, others in IMPORTS.items():
        for other in others:
            if room(module) and room(other) and room(module) != room(other):
                arrows[room(module)].add(room(other))
    assert circle(arrows) == []


@pytest.mark.parametrize("low", ["adjoints", "steppers", "neighbors", "potentials"])
def test_the_lower_rooms_know_nothing_of_the_upper(low):
    def reach(module: str, seen: set[str]) -> set[str]:
        for other in IMPORTS.get(module, set()) - seen:
            seen.add(other)
            reach(other, seen)
        return seen

    reached = {room(other) for module in IMPORTS if room(module) == low for other in reach(module, set())}
    assert not reached & {"training", "report", "drift", "cli", "diagnostics", "terms", "evaluation"}


def test_size():
    assert len(FILES) <= 156
    assert sum(path.parent == ROOT for path in FILES) <= 20
    assert {path.name: n for path in FILES if (n := len(path.read_text().splitlines())) > 300} == {}


def test_what_tests_share_stands_in_their_helpers():
    taboo = {path.stem for path in TESTS if path.stem.startswith("test_") or path.stem == "conftest"}
    found = {}
    for path in TESTS:
        nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in nodes for alias in node.names} | {getattr(n, "module", None) for n in nodes}
        if names & taboo:
            found[path.name] = names & taboo
    assert found == {}
