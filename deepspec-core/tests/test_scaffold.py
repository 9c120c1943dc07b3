"""`deepspec new` writes packages that keep their contracts as they are written, and nothing where a name is wrong."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from typing import Any

import pytest
from plugin_on_path import install_project

from deepspec_core.cli.main import main
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.scaffold import writing
from deepspec_core.scaffold.writing import KINDS
from deepspec_core.testing.conformance import Suite, broken_by, clauses
from deepspec_core.testing.public_imports import check_public_imports

ROOT = Path(__file__).parents[2]


def written(kind: str, folder: Path, name: str = "") -> Path:
    """A new package, by the command."""
    name = name or f"newly-{kind}"
    assert main(["new", kind, name, "-o", str(folder)]) == 0
    return folder / f"deepspec-{name}"


def module_of(package: Path) -> Any:
    """Its test file, imported."""
    (path,) = package.glob("tests/test_*.py")
    spec = importlib.util.spec_from_file_location(f"scaffolded_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# All clauses of these are tested by default; of the other kinds two, and the rest in slow tests.
WHOLE = ("draft", "loss", "task", "command")


@pytest.mark.parametrize(
    ("kind", "whole"),
    [
        *((kind, kind in WHOLE) for kind in KINDS),
        *(pytest.param(kind, True, marks=pytest.mark.slow) for kind in KINDS if kind not in WHOLE),
    ],
)
def test_a_new_package_keeps_its_contract(
    kind: str, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Both cases of a kind may run in one process, which keeps what it imported.
    package = written(kind, tmp_path, f"newly-{kind}-{'whole' if whole else 'first'}")
    assert f"wrote {package}" in capsys.readouterr().out
    about = tomllib.loads((package / "pyproject.toml").read_text())
    assert about["project"]["dependencies"] == ["deepspec-core>=0.2,<0.3"]
    texts = [path.read_text() for path in package.rglob("*") if path.is_file()]
    assert not [text for text in texts if re.search(r"@[A-Z]+@", text)], "a word that was not filled in"
    install_project(package, tmp_path / "site", monkeypatch)
    check_public_imports(package / "src")
    module = module_of(package)
    classes = [one for _, one in inspect.getmembers(module, inspect.isclass) if one.__name__.startswith("Test")]
    suites = [one for one in classes if issubclass(one, Suite)]
    assert len(suites) == (kind != "command")
    for suite in suites:
        assert broken_by(suite, None if whole else [*clauses(suite)][:2]) == {}


def test_a_new_command_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install_project(written("command", tmp_path, "telling"), tmp_path / "site", monkeypatch)
    assert main(["telling", str(tmp_path)]) == 2
    assert "there is no draft" in capsys.readouterr().err
    assert main(["new", "--help"]) == 0


def test_a_new_draft_can_be_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = written("draft", tmp_path, "runnable")
    install_project(package, tmp_path / "site", monkeypatch)
    assert main(["config", "check", str(package / "train.toml")]) == 0


@pytest.mark.slow
def test_a_new_draft_trains_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = written("draft", tmp_path, "trained")
    install_project(package, tmp_path / "site", monkeypatch)
    assert main(["run", str(package / "train.toml"), "--smoke", "--set", "run.threads=1"]) == 0


@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [
        ("draft", "My_Draft", "cannot have this name"),
        ("draft", "1st", "cannot have this name"),
        ("draft", "../out", "cannot have this name"),
        ("loss", "class", "cannot have this name"),
        ("loss", "kl", "is there already"),
        ("cache", "hdf5", "is there already"),
        ("command", "run", "is there already"),
        ("loss", "core", "is installed already"),
    ],
)
def test_names_are_checked(kind: str, name: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", kind, name, "-o", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "deepspec-mine"
    package.mkdir()
    (package / "notes.txt").write_text("kept")
    assert main(["new", "task", "mine", "-o", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in package.iterdir()] == ["notes.txt"]
    assert main(["new", "task", "mine", "-o", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["new", "task", "mine", "-o", str(tmp_path), "--for", "x"]) == 2


def test_new_packages_are_sorted_and_formatted(tmp_path: Path) -> None:
    for kind in KINDS:
        package = written(kind, tmp_path, f"a-{kind}")
        for command in (["check"], ["format", "--check"]):
            subprocess.run([sys.executable, "-m", "ruff", *command, "-q", "--no-cache", "."], cwd=package, check=True)


# Python's own words, and names that a template imports or builds on.
UNLUCKY = ("none", "true", "json", "click", "tensor", "row-stats", "family", "shard", "sharded")


@pytest.mark.parametrize("kind", KINDS)
def test_no_name_hides_what_a_package_imports(kind: str, tmp_path: Path) -> None:
    registry = load_plugins().registry
    for name in UNLUCKY:
        package = writing.write_package(kind, name, tmp_path, registry=registry, taken=set(), algorithm="dflash")
        for path in package.rglob("*.py"):
            tree = ast.parse(path.read_text())
            imports = [one for one in ast.walk(tree) if isinstance(one, ast.Import | ast.ImportFrom)]
            imported = {(one.asname or one.name) for statement in imports for one in statement.names}
            defined = {one.name for one in tree.body if isinstance(one, ast.FunctionDef | ast.ClassDef)}
            assert not imported & defined, f"{name}: {path.name}"


def test_drafts_whose_names_end_alike_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suites = []
    for name in ("tree", "my-tree"):
        package = written("draft", tmp_path, name)
        install_project(package, tmp_path / "site" / name, monkeypatch)
        suites.append(next(one for name, one in vars(module_of(package)).items() if name in ("TestTree", "TestMyTree")))
    assert {"tree", "my-tree"} <= set(load_plugins().registry.trained_drafts())
    for suite in suites:
        # Without a plugin of its own to look in, a suite looks in all that are installed.
        suite.plugin = None
        assert broken_by(suite, ["test_a_checkpoint_is_the_same_draft"]) == {}


def test_an_exporter_is_of_a_draft_that_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for algorithm in ("small-lm", "dflsh"):
        assert main(["new", "exporter", "mine", "--for", algorithm, "-o", str(tmp_path)]) == 2
        told = capsys.readouterr().err
        assert "no draft type of this name is trained" in told
        assert "small-lm" not in told.partition("expected:")[2]
    assert "write 'dflash'" in told
    assert list(tmp_path.iterdir()) == []


def test_what_the_disk_refuses_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new", "task", "a" * 260, "-o", str(tmp_path)]) == 2
    assert "File name too long" in capsys.readouterr().err
    real = writing.tempfile.mkdtemp

    def slow(**where: Any) -> str:
        """Another process makes the folder meanwhile."""
        made = real(**where)
        (tmp_path / "deepspec-twin").mkdir()
        (tmp_path / "deepspec-twin" / "theirs").touch()
        return made

    monkeypatch.setattr(writing.tempfile, "mkdtemp", slow)
    assert main(["new", "task", "twin", "-o", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "the package cannot be written" in told
    assert "not empty" in told
    assert os.listdir(tmp_path) == ["deepspec-twin"]
    assert os.listdir(tmp_path / "deepspec-twin") == ["theirs"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_package_is_installed_and_tested(kind: str, tmp_path: Path) -> None:
    """In an environment of its own, which sees the packages of this one."""
    package = written(kind, tmp_path)
    venv.create(tmp_path / "env", system_site_packages=False, with_pip=True)
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    ours = [path for path in sys.path if path.endswith("site-packages")] + [str(one) for one in ROOT.glob("*/src")]
    (site / "ours.pth").write_text("\n".join(ours) + "\n")
    python = str(tmp_path / "env" / "bin" / "python")
    install = [python, "-m", "pip", "install", "-q", "--no-deps", str(package)]
    subprocess.run(install, check=True, timeout=300)
    listed = subprocess.run([python, "-m", "deepspec_core", "plugins"], capture_output=True, text=True, timeout=120)
    assert f"newly-{kind}" in listed.stdout
    subprocess.run([python, "-m", "pytest", "-q", str(package)], check=True, timeout=300, cwd=package)
