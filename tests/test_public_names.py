"""What plugins may import, of core and of each other, is said in the source and listed; our plugins keep to it."""

import ast
import importlib
from pathlib import Path

import pytest

import deepspec_core
from deepspec_core.errors import PluginError
from deepspec_core.plugins.promised import plugin_packages, promised_names
from deepspec_core.plugins.public import PUBLIC_MODULES, markdown, public_names
from deepspec_core.testing.public_imports import check_public_imports

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "public-names.md"
CORE = Path(deepspec_core.__file__).parent
PLUGINS = [
    *(ROOT / f"deepspec-{name}" / "src" for name in ("targets", "dflash", "dspark", "eagle3", "tasks")),
    *sorted(path for path in (ROOT / "examples" / "plugins").iterdir() if path.is_dir()),
]
# The packages of this repository that promise names to other plugins.
PROMISING = ("deepspec_dflash",)


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


# What stands in a function -> what is told of it.
PRIVATE = {
    "from deepspec_core.rows.engine import RowEngine": "deepspec_core.rows.engine.RowEngine",
    "from deepspec_core.layers.attention import _angles": "deepspec_core.layers.attention._angles",
    "from deepspec_core.contracts import shapes": "deepspec_core.contracts.shapes",
    "import deepspec_core.rows.engine": "deepspec_core.rows.engine",
    "import deepspec_core; deepspec_core.rows.engine.RowEngine()": "deepspec_core.rows.engine.RowEngine",
    "import deepspec_core as core; core.rows": "deepspec_core.rows",
    "import deepspec_core.errors as e; e._shown(e.DataError)": "deepspec_core.errors._shown",
    "from deepspec_core import errors; errors._shown": "deepspec_core.errors._shown",
    "import deepspec_core; core = deepspec_core; core.rows": "deepspec_core.rows",
    "import importlib; importlib.import_module('deepspec_core.rows.engine')": "deepspec_core.rows.engine",
    "from importlib import import_module as load; load(name='deepspec_core.rows')": "deepspec_core.rows",
    "import importlib; importlib.import_module('.engine', 'deepspec_core.rows')": "deepspec_core.rows.engine",
    "import importlib; importlib.import_module('deepspec_core.errors')._shown": "deepspec_core.errors._shown",
    "__import__('deepspec_core.rows.engine')": "deepspec_core.rows.engine",
    "ComponentSpec(build='deepspec_core.rows.engine:RowEngine')": "deepspec_core.rows.engine.RowEngine",
    "from deepspec_dflash.attention import BlockLayout": "deepspec_dflash.attention.BlockLayout",
    "from deepspec_dflash.proposer import SlotKVCache": "deepspec_dflash.proposer.SlotKVCache",
    "from deepspec_dflash import backbone": "deepspec_dflash.backbone",
    "from deepspec_tasks.plugin import deepspec_tasks": "deepspec_tasks.plugin.deepspec_tasks",
}


@pytest.mark.parametrize("line", PRIVATE)
def test_a_private_name_inside_a_function_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "plugin.py").write_text("from deepspec_core.plugins import hookimpl\n")
    check_public_imports(tmp_path)
    (tmp_path / "loss.py").write_text(f"def f():\n    {line}\n")
    with pytest.raises(AssertionError) as failed:
        check_public_imports(tmp_path)
    assert f"'loss.py: {PRIVATE[line]}'" in str(failed.value)


def test_public_names_may_be_reached_in_every_way(tmp_path: Path) -> None:
    (tmp_path / "loss.py").write_text("""
import importlib
import deepspec_core.layers.softcap
import deepspec_dflash.plugin
from deepspec_core.contracts import rows
from deepspec_dflash.model import DFlashModel

capped = deepspec_core.layers.softcap.softcapped
error = importlib.import_module("deepspec_core.errors").DataError
kind = rows.Rows.__name__

def f(rows, core):
    for importlib in rows.extras:
        core.rows
    return lambda deepspec_core: deepspec_core.rows
""")
    check_public_imports(tmp_path)


def test_a_plugin_may_import_its_own_private_modules() -> None:
    check_public_imports(ROOT / "deepspec-dflash" / "src" / "deepspec_dflash")
    assert {"deepspec_core", "deepspec_dflash"} <= set(plugin_packages())


def test_names_must_be_literal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "promising.py").write_text("__all__ = sorted(['Draft'])\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match="`__all__` cannot be read") as told:
        promised_names("promising")
    assert "promising" in told.value.render()


@pytest.mark.parametrize("module", [*PUBLIC_MODULES, *(name for one in PROMISING for name in promised_names(one))])
def test_every_public_name_is_there_and_says_what_it_is(module: str) -> None:
    loaded = importlib.import_module(module)
    names = public_names(module)
    assert names
    assert sorted(loaded.__all__) == sorted(set(loaded.__all__))
    assert [one.name for one in names if not one.about] == [], "give it a docstring; a constant has it below itself"


def test_the_page_is_current() -> None:
    ours = {path.name for path in ROOT.glob("deepspec-*/src/*") if path.is_dir()} - {"deepspec_core"}
    assert sorted(name for name in ours if promised_names(name)) == sorted(PROMISING)
    assert PAGE.read_text(encoding="utf-8") == markdown(*PROMISING), "write it anew, as CONTRIBUTING.md says"
