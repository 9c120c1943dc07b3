"""What plugins may import of core is one list: documented, complete, and kept to by this repository's own plugins."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepspec_core.plugins.public import PUBLIC_MODULES, markdown, public_names

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "public-names.md"
PLUGINS = [
    *(ROOT / f"deepspec-{name}" / "src" for name in ("targets", "dflash", "dspark", "eagle3")),
    *sorted(path for path in (ROOT / "examples" / "plugins").iterdir() if path.is_dir()),
]


def _imports(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """(file, module, name) of everything imported from core, inside functions too."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deepspec_core":
                yield from ((path, node.module or "", alias.name) for alias in node.names)
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("deepspec_core.") for alias in node.names), path


@pytest.mark.parametrize("folder", PLUGINS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_plugins_import_public_names_only(folder: Path) -> None:
    found = list(_imports(folder))
    assert found, "a plugin imports something of core"
    private = [
        f"{path.relative_to(ROOT)}: {module}.{name}"
        for path, module, name in found
        if module not in PUBLIC_MODULES or name not in importlib.import_module(module).__all__
    ]
    assert private == []


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_every_public_name_is_there_and_says_what_it_is(module: str) -> None:
    loaded = importlib.import_module(module)
    names = public_names(module)
    assert names
    assert sorted(loaded.__all__) == sorted(set(loaded.__all__))
    for one in names:
        value = getattr(loaded, one.name)
        if inspect.isclass(value) or inspect.isroutine(value):
            assert one.about, f"{module}.{one.name} has no docstring"


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), "write it anew: plugins.public.markdown()"
