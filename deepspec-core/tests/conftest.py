"""Distributions that are not installed: a folder on sys.path with a plugin module and its metadata each.

And run files that name what they offer, loaded by `load`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import dedent

import pytest
from run_file_loading import Loader

from deepspec_core.plugins.discovery import Plugins, load_plugins


class Distributions:
    """Writes fake distributions into `folder`, which is on sys.path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: list[str] = []

    def add(
        self,
        package: str,
        source: str,
        *,
        plugin: str | None = None,
        version: str = "1.0",
        requires: Sequence[str] = (),
        extra_modules: dict[str, str] | None = None,
    ) -> str:
        """A distribution with one plugin, named like the package unless said otherwise; returns its module's name."""
        module = package.replace("-", "_") + "_plugin"
        prelude = "from __future__ import annotations\n"
        prelude += "from deepspec_core.plugins.hooks import hookimpl\nfrom deepspec_core.plugins.specs import *\n"
        for name, text in {module: prelude + dedent(source), **(extra_modules or {})}.items():
            (self.folder / f"{name}.py").write_text(dedent(text))
            self.modules.append(name)
        info = self.folder / f"{package.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {package}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {text}" for text in requires)]) + "\n")
        (info / "entry_points.txt").write_text(f"[deepspec]\n{plugin or package} = {module}\n")
        importlib.invalidate_caches()
        return module


@pytest.fixture
def distributions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Distributions]:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    made = Distributions(folder)
    yield made
    for name in made.modules:
        sys.modules.pop(name, None)


TOY = """
    from attrs import field, frozen
    from attrs.validators import gt

    @frozen(kw_only=True)
    class Head:
        rank: int = field(default=8, validator=gt(0))
        kind: str = "vanilla"

    @frozen(kw_only=True)
    class ToyOptions:
        block_size: int = field(default=7, validator=gt(0))
        num_layers: int = 2
        dropout: float = 0.0
        mask_token_id: int | None = None
        head: Head | None = None
        widths: tuple[int, ...] = ()

    @hookimpl
    def deepspec_draft_models():
        return [
            DraftModelSpec(
                name="toy", summary="a toy", build="toy_model:Toy", options=ToyOptions, class_suffix="ToyModel",
                options_of="toy_model:options_of", recognise=lambda config: config.get("architectures") == ["ToyModel"],
            )
        ]
"""


@pytest.fixture
def toy(distributions: Distributions) -> Distributions:
    """A distribution that offers the draft type `toy`, with typed options."""
    distributions.add("fake-toy", TOY)
    return distributions


@pytest.fixture
def plugins(toy: Distributions) -> Plugins:
    """Installed plugins, and some that are not: an algorithm, exports, a task, builtins."""
    toy.add(
        "fake-export",
        """
        @hookimpl
        def deepspec_exporters():
            return [
                ExportSpec(name="served", summary="", build="types:SimpleNamespace", algorithm="toy"),
                ExportSpec(name="foreign", summary="", build="a:b", algorithm="other"),
            ]

        @hookimpl
        def deepspec_tasks():
            return [TaskSpec(name="sums", summary="", build="a:b")]

        @hookimpl
        def deepspec_builtins():
            return [
                BuiltinSpec(name="small-model", summary="", build="a:b", kind="model"),
                BuiltinSpec(name="small-talk", summary="", build="a:b", kind="prompts"),
            ]
        """,
    )
    return load_plugins()


@pytest.fixture
def load(tmp_path: Path, plugins: Plugins) -> Loader:
    """load(text, *overrides): the run file that says `text`."""
    return Loader(tmp_path, plugins)
