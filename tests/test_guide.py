"""The guides for authors of plugins are true: their snippets run, their tables are measured, every hook is in them."""

import ast
import importlib
import importlib.resources
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from plugin_on_path import install_project

import deepspec_core
from deepspec_core import testing as kit
from deepspec_core.cli.main import main
from deepspec_core.plugins import ComponentSpec, ExportSpec, hooks
from deepspec_core.plugins.public import PUBLIC_MODULES
from deepspec_core.plugins.registry import KINDS
from deepspec_core.testing.conformance import broken_by

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
REFERENCE = (ROOT / "docs" / "contracts.md").read_text(encoding="utf-8")
FIRST = (ROOT / "docs" / "first-plugin.md").read_text(encoding="utf-8")
EXAMPLES = sorted(path for path in (ROOT / "examples" / "plugins").iterdir() if (path / "pyproject.toml").exists())
HOOKS = sorted(name for name in vars(hooks) if name.startswith("deepspec_"))
# Clauses that tell in little time whether the edited draft is still one.
TELLING = ("test_rows_keep_their_form", "test_a_checkpoint_is_the_same_draft", "test_proposals_can_be_verified")


def blocks(page: str, language: str) -> list[str]:
    return [textwrap.dedent(code) for code in re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)]


def public_names() -> dict[str, Any]:
    """What snippets take for imported: every public name, and what their sentences name."""
    import json
    from collections.abc import Mapping

    import torch
    from attrs import evolve
    from safetensors.torch import save_file
    from torch import Tensor, nn

    names: dict[str, Any] = {}
    for module in PUBLIC_MODULES:
        found = importlib.import_module(module)
        names |= {name: getattr(found, name) for name in getattr(found, "__all__", ()) if hasattr(found, name)}
    common = {"json": json, "torch": torch, "evolve": evolve, "save_file": save_file, "Tensor": Tensor, "nn": nn}
    return names | common | {"Mapping": Mapping, "Path": Path}


@pytest.fixture(scope="module")
def snippets() -> dict[str, Any]:
    """What the guide's Python defines, one block after another."""
    defined = public_names() | {"__name__": "snippets", "MyOptions": object, "KEY": ""}
    for code in blocks(GUIDE, "python"):
        exec(compile("from __future__ import annotations\n" + code, "docs/plugins.md", "exec"), defined)
    return defined


def test_the_guides_plugin_is_one(snippets: dict[str, Any]) -> None:
    (spec,) = snippets["deepspec_losses"]()
    assert spec.name == "hellinger"
    example = ROOT / "examples" / "plugins" / "deepspec-hellinger"
    shown = ast.dump(ast.parse(blocks(GUIDE, "python")[0]).body[-1])
    assert shown == ast.dump(_without_docstrings(example / "src" / "deepspec_hellinger" / "plugin.py").body[-1])


def _without_docstrings(path: Path) -> ast.Module:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
            node.body = [one for one in node.body if not isinstance(one, ast.Expr) or isinstance(one.value, ast.Yield)]
    return tree


def offered(hook: str, spec: Any) -> Any:
    return SimpleNamespace(**{hook: lambda: [spec]}, __name__="shown")


def test_the_guides_loss_keeps_its_contract(snippets: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kit, "shown", snippets["Tempered"], raising=False)
    spec = ComponentSpec(
        name="tempered", summary="", build="deepspec_core.testing:shown", options=snippets["TemperedOptions"]
    )

    class Shown(kit.LossSuite):
        component = "tempered"
        plugin = offered("deepspec_losses", spec)

    assert broken_by(Shown) == {}


def test_the_guides_exporter_keeps_its_contract(snippets: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspec_dflash.plugin

    monkeypatch.setattr(kit, "shown", snippets["Exporter"], raising=False)
    spec = ExportSpec(name="shown", summary="", build="deepspec_core.testing:shown", algorithm="dflash")

    class Shown(kit.ExporterSuite):
        component, algorithm = "shown", "dflash"
        draft_options = {"block_size": 4, "num_layers": 1}  # noqa: RUF012
        plugin = (offered("deepspec_exporters", spec), deepspec_dflash.plugin)

    assert broken_by(Shown) == {}


def code_lines(package: Path) -> int:
    """Lines of a package's sources that are neither empty, nor comments, nor docstrings."""
    return sum(len(set(_code(path))) for path in package.glob("src/**/*.py"))


def _code(path: Path) -> Iterator[int]:
    text = path.read_text(encoding="utf-8")
    told = set[int]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            told |= set(range(node.lineno, int(node.end_lineno or node.lineno) + 1))
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.strip().startswith("#") and number not in told:
            yield number


@pytest.mark.parametrize("package", EXAMPLES, ids=lambda path: path.name)
def test_example_plugins_are_as_long_as_the_guide_says(package: Path) -> None:
    row = re.search(rf"^\| \[{package.name}\]\([^)]*\) \|[^|]*\| (\d+) \|", GUIDE, re.M)
    assert row is not None, f"{package.name} has no row in the table of docs/plugins.md"
    assert int(row[1]) == code_lines(package)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_in_the_reference(hook: str) -> None:
    assert getattr(hooks, hook).__doc__
    assert f"### `{hook}`" in REFERENCE
    used = [
        path
        for folder in ("deepspec-core/tests", "tests", "examples/plugins", *(f"deepspec-{p}/src" for p in PACKAGES))
        for path in (ROOT / folder).rglob("*.py")
        if path not in (Path(__file__), Path(str(hooks.__file__)))
        and f"def {hook}(" in path.read_text(encoding="utf-8")
    ]
    assert used, f"no plugin and no test implements {hook}"


PACKAGES = ("core", "targets", "dflash", "dspark", "eagle3", "export", "tasks")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_in_the_reference(kind: str) -> None:
    """With its hook, the class of its spec, where its contract is, and its suite where there is one."""
    section = REFERENCE.split(f"### `{KINDS[kind].hook}`")[1].split("\n### ")[0]
    assert f"`{KINDS[kind].spec.__name__}`" in section
    suites = [one for name in kit.__all__ if getattr(one := getattr(kit, name), "kind", None) == kind]
    for suite in suites:
        assert f"`{suite.__name__}`" in section
    for module, name in re.findall(r"`(contracts\.\w+)\.(\w+)`", section):
        assert hasattr(importlib.import_module(f"deepspec_core.{module}"), name)


def test_every_contract_is_in_the_reference() -> None:
    contracts = Path(deepspec_core.__file__).parent / "contracts"
    for path in contracts.glob("[a-z]*.py"):
        assert f"contracts.{path.stem}" in REFERENCE, path.stem


def edited(folder: Path) -> Path:
    """`deepspec new draft mydraft`, with the edit that the page shows."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspec_mydraft"]:
        del sys.modules[name]  # another test's
    assert main(["new", "draft", "mydraft", "-o", str(folder)]) == 0
    package = folder / "deepspec-mydraft"
    (diff,) = blocks(FIRST, "diff")
    (folder / "edit.diff").write_text(diff)
    subprocess.run(["git", "apply", "-p1", "../edit.diff"], check=True, cwd=package)
    return package


@pytest.mark.parametrize("only", [TELLING, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
def test_the_first_plugin_is_a_draft(only: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = edited(tmp_path)
    install_project(package, tmp_path / "site", monkeypatch)
    assert main(["config", "check", str(package / "train.toml")]) == 0

    class Edited(kit.DraftModelSuite):
        component = "mydraft"
        options = {"block_size": 4, "num_anchors": 8}  # noqa: RUF012

    assert broken_by(Edited, only) == {}


def test_the_runs_of_the_first_plugin_can_follow_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of results has one set of data, and DFlash's run differs from the draft's where it says so."""
    install_project(edited(tmp_path), tmp_path / "site", monkeypatch)
    monkeypatch.chdir(tmp_path)
    commands = "\n".join(blocks(FIRST.partition("## Train it")[2].partition("## Export it")[0], "sh"))
    shown: dict[str, Any] = {}
    for line in filter(None, commands.replace("\\\n", " ").splitlines()):
        words = shlex.split(line)
        if words[:2] == ["deepspec", "run"]:
            capsys.readouterr()
            assert main(["config", "show", *words[2:]]) == 0
            config = tomllib.loads(capsys.readouterr().out)
            output = config["run"]["output"]
            assert shown.setdefault(output, config)["data"] == config["data"], f"other data under {output}: {line}"
        elif words[0] in ("cp", "sed"):
            # What is copied from a run stands for its stages: they are made here, empty.
            for word in words:
                if word.startswith("runs/mydraft/"):
                    Path(word).mkdir(parents=True)
            subprocess.run(line, shell=True, check=True)
        elif words[0] == "mkdir":
            subprocess.run(words, check=True)
    assert {path.name for path in Path("runs/dflash").iterdir()} == {"regenerate", "cache"}
    (mydraft,) = [config for config in shown.values() if Path(config["run"]["output"]).name == "mydraft"]
    (dflash,) = [config for config in shown.values() if config["draft"]["type"] == "dflash"]
    for section in ("target", "data", "regenerate", "features", "cache", "train", "evaluate"):
        assert mydraft[section] == dflash[section], section


def test_templates_are_files_of_the_package() -> None:
    """A wheel has every file under the package's folder, unless a rule leaves it out."""
    from deepspec_core.scaffold.writing import KINDS as NEW

    build = tomllib.loads((ROOT / "deepspec-core" / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert build == {"targets": {"wheel": {"packages": ["src/deepspec_core"]}}}
    templates = importlib.resources.files("deepspec_core.scaffold") / "templates"
    for kind in (*NEW, "every_kind"):
        assert [one.name for one in (templates / kind).iterdir() if one.name.endswith(".tmpl")], kind
    ignored = subprocess.run(
        ["git", "check-ignore", "-q", "deepspec-core/src/deepspec_core/scaffold/templates/draft/train.toml.tmpl"],
        cwd=ROOT,
        check=False,
    )
    assert ignored.returncode != 0, "hatchling leaves out what git ignores"
