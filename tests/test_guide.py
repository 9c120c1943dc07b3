"""The guides for authors of plugins are true: their tables are measured, and the first plugin works.

The Python of docs/plugins.md is run by test_guide_snippets.py, and docs/contracts.md is read by test_reference.py.
"""

import ast
import importlib
import importlib.resources
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from counted_snippets import blocks
from plugin_on_path import install_project

from deepspec_core import testing as kit
from deepspec_core.cli.main import main
from deepspec_core.testing.conformance import broken_by

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
FIRST = (ROOT / "docs" / "first-plugin.md").read_text(encoding="utf-8")
EXAMPLES = sorted(path for path in (ROOT / "examples" / "plugins").iterdir() if (path / "pyproject.toml").exists())
# Clauses that tell in little time whether the edited draft is still one.
TELLING = ("test_rows_keep_their_form", "test_a_checkpoint_is_the_same_draft", "test_proposals_can_be_verified")


def test_the_guides_pyproject_is_the_example_plugins() -> None:
    (shown,) = (tomllib.loads(block) for block in blocks(GUIDE, "toml"))
    real = tomllib.loads((ROOT / "examples/plugins/deepspec-hellinger/pyproject.toml").read_text(encoding="utf-8"))
    assert shown["project"].items() <= real["project"].items()


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
    missed = re.search(rf"at most 200 lines\. {package.name} misses it by (\d+)\.", GUIDE)
    assert (int(missed[1]) if missed else 0) == max(0, code_lines(package) - 200)


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
    monkeypatch.chdir(tmp_path)
    (commands,) = blocks(FIRST.partition("## Install and test it")[2].partition("## Train it")[0], "sh")
    tried = [shlex.split(line)[1:] for line in commands.splitlines() if line.startswith("deepspec ")]
    assert [words[0] for words in tried] == ["plugins", "config", "run"]
    for words in tried:
        assert main(words) == 0

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
