"""How the source is laid out: no circles of imports, files of a size to read, folders as the README draws them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(ROOT.glob("deepspec-*/src"))
LONGEST = 400


def _modules() -> dict[str, Path]:
    """Module name -> file, of all seven packages."""
    found = {}
    for source in SOURCES:
        for path in source.rglob("*.py"):
            parts = path.relative_to(source).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Our own modules that a file imports: at its top, inside functions, and for type checkers."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if (module := inner if inner in known else node.module) in known:
                    yield module


def test_no_circles_of_imports() -> None:
    known = _modules()
    assert len(known) > 150
    graph = {name: sorted(set(_imports(path, known))) for name, path in known.items()}
    done: set[str] = set()

    def walk(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            circle = [*above[above.index(name) :], name]
            pytest.fail("a circle of imports: " + " -> ".join(circle))
        if name not in done:
            for imported in graph[name]:
                walk(imported, (*above, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def test_files_are_of_a_size_to_read() -> None:
    tests = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("deepspec-*/tests/**/*.py"), *ROOT.glob("*.py")]
    assert len(tests) > 80
    files = [*_modules().values(), *tests]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_every_file_says_what_it_knows() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in _modules().values()
        if path.read_text("utf-8").strip() and not ast.get_docstring(ast.parse(path.read_text("utf-8")))
    ]
    assert silent == []


def test_the_readme_draws_the_folders_there_are() -> None:
    core = ROOT / "deepspec-core"
    drawn = set(re.findall(r"^  (\w+)/ ", (core / "README.md").read_text("utf-8"), re.MULTILINE))
    there = {path.parent.name for path in (core / "src" / "deepspec_core").glob("*/__init__.py")}
    assert drawn == there
