"""A plugin that is there while a test runs: a module and its metadata in a folder on sys.path. Knows no test."""

import importlib
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
