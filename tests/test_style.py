"""The rules of the house: lint, format, types, floors, sizes, docstrings, and what modeling/ may import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("configs", "launch", "training", "analysis", "quant", "modeling")
FOLDERS = (*FLOORS, "tests", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80
CHECKS = {
    "ruff": [sys.executable, "-m", "ruff", "check", "."],
    "format": [sys.executable, "-m", "ruff", "format", "--check", "."],
    "mypy": [sys.executable, "-m", "mypy"],
    "imports": [str(Path(sys.executable).with_name("lint-imports"))],
}


@pytest.mark.parametrize("check", CHECKS)
def test_checker_is_content(check: str) -> None:
    result = subprocess.run(CHECKS[check], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, f"{' '.join(CHECKS[check])}\n{result.stdout[-8000:]}{result.stderr[-2000:]}"


def test_files_can_be_read_in_one_sitting() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert lengths
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def _functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and number of lines of every function in a file, decorators left out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield f"{path.relative_to(ROOT)}:{node.name}", node.end_lineno - node.lineno + 1


def test_functions_fit_on_a_screen() -> None:
    assert {name: lines for path in SOURCES for name, lines in _functions(path) if lines > MAX_FUNCTION_LINES} == {}


def test_modeling_is_flat() -> None:
    """An exported model ships these very files to the Hub, which knows no sub-packages."""
    assert [path for path in (ROOT / "modeling").iterdir() if path.is_dir() and path.name != "__pycache__"] == []


def _imports(path: Path) -> set[str]:
    """Top-level names of the packages that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("modeling" if node.level else (node.module or "").split(".")[0])
    return names


def test_modeling_needs_only_torch_and_transformers() -> None:
    allowed = sys.stdlib_module_names | {"torch", "transformers", "modeling"}
    foreign = {path.name: _imports(path) - allowed for path in (ROOT / "modeling").glob("*.py")}
    assert {name: names for name, names in foreign.items() if names} == {}


def _public(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef]:
    """A module with content, and its top-level classes and functions without a leading underscore."""
    if tree.body:
        yield tree
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node


def test_public_modules_classes_and_functions_say_what_they_are() -> None:
    silent = [
        f"{path.relative_to(ROOT)}:{getattr(node, 'name', 'module')}"
        for path in SOURCES
        if not path.is_relative_to(ROOT / "tests")
        for node in _public(ast.parse(path.read_text()))
        if ast.get_docstring(node) is None
    ]
    assert silent == []
