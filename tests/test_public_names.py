"""What plugins may import of core is one list: documented, complete, marked in the source; our plugins keep to it."""

import ast
import importlib
from pathlib import Path

import pytest

import deepspec_core
from deepspec_core.plugins.public import PUBLIC_MODULES, markdown, public_names
from deepspec_core.testing.public_imports import check_public_imports

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "public-names.md"
CORE = Path(deepspec_core.__file__).parent
PLUGINS = [
    *(ROOT / f"deepspec-{name}" / "src" for name in ("targets", "dflash", "dspark", "eagle3")),
    *sorted(path for path in (ROOT / "examples" / "plugins").iterdir() if path.is_dir()),
]


def _declares_public_names(path: Path) -> bool:
    """Whether a file assigns `__all__`, wherever in it and however."""
    return any(
        isinstance(node, ast.Name) and node.id == "__all__" and isinstance(node.ctx, ast.Store)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    )


def test_public_modules_are_those_that_say_so() -> None:
    files = {".".join(path.relative_to(CORE.parent).with_suffix("").parts): path for path in CORE.rglob("*.py")}
    declared = {name.removesuffix(".__init__") for name, path in files.items() if _declares_public_names(path)}
    assert declared == set(PUBLIC_MODULES), "a module has __all__ exactly if it is in plugins/public.py"


@pytest.mark.parametrize("folder", PLUGINS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_plugins_import_public_names_only(folder: Path) -> None:
    check_public_imports(folder)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from deepspec_core.rows.engine import RowEngine", "deepspec_core.rows.engine.RowEngine"),
        ("from deepspec_core.layers.attention import _angles", "deepspec_core.layers.attention._angles"),
        ("from deepspec_core.contracts import rows", "deepspec_core.contracts.rows"),
        ("import deepspec_core.errors", "deepspec_core.errors"),
    ],
)
def test_a_private_import_inside_a_function_is_found(tmp_path: Path, line: str, found: str) -> None:
    (tmp_path / "plugin.py").write_text("from deepspec_core.plugins import hookimpl\n")
    check_public_imports(tmp_path)
    (tmp_path / "loss.py").write_text(f"def f():\n    {line}\n")
    with pytest.raises(AssertionError, match=rf"not public: \['loss.py: {found}'\]"):
        check_public_imports(tmp_path)


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_every_public_name_is_there_and_says_what_it_is(module: str) -> None:
    loaded = importlib.import_module(module)
    names = public_names(module)
    assert names
    assert sorted(loaded.__all__) == sorted(set(loaded.__all__))
    assert [one.name for one in names if not one.about] == [], "give it a docstring; a constant has it below itself"


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), "write it anew: plugins.public.markdown()"
