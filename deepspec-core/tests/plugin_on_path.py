"""A plugin that is there while a test runs: a module and its metadata in a folder on sys.path. Knows no test."""

import importlib
import tomllib
from pathlib import Path

import pytest


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str) -> None:
    """The distribution `name`, whose plugin module has this source."""
    module = name.replace("-", "_")
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{module}.py").write_text(source)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[deepspec]\n{name} = {module}\n")
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()


def install_project(project: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin of a project's folder as if installed: its metadata, written to `folder`, from its pyproject.toml."""
    about = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    info = folder / f"{about['name'].replace('-', '_')}-{about['version']}.dist-info"
    info.mkdir(parents=True)
    requires = "".join(f"Requires-Dist: {requirement}\n" for requirement in about["dependencies"])
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n{requires}"
    )
    points = "".join(f"{name} = {module}\n" for name, module in about["entry-points"]["deepspec"].items())
    (info / "entry_points.txt").write_text(f"[deepspec]\n{points}")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.syspath_prepend(str(project / "src"))
    importlib.invalidate_caches()
