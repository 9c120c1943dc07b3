"""A plugin with an export format, written and installed while a test runs. Knows no test."""

from collections.abc import Callable
from pathlib import Path

import pytest

SPEC = """
from deepspec_core.plugins import ExportSpec, hookimpl

@hookimpl
def deepspec_exporters():
    return [ExportSpec(name="plain", summary="a plain copy", build="{module}_writer:Writer", algorithm="dflash")]
"""
WRITER = """
import json
from safetensors.torch import save_file

class Writer:
    def unservable(self, facts):
        return {unservable}

    def write(self, draft, facts, out):
        {write}
"""
COPY = (
    'save_file({name: value.contiguous().clone() for name, value in draft.state_dict().items()}, out / "w.safetensors")'
    '; (out / "config.json").write_text(json.dumps(dict(draft.describe().config)))'
)


def offering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """offer(unservable=..., write=...): installs a plugin with the format "plain" for DFlash, its two answers as code.

    `writer`: another module in place of the exporter's, none where it is empty.
    """
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    made: list[str] = []

    def make(*, unservable: str = "None", write: str = COPY, writer: str = WRITER) -> None:
        module = f"exports_{tmp_path.name}_{len(made)}".replace("-", "_")
        for old in site.iterdir():
            old.rename(tmp_path / f"old-{len(made)}-{old.name}")
        made.append(module)
        (site / f"{module}.py").write_text(SPEC.format(module=module))
        if writer:
            (site / f"{module}_writer.py").write_text(writer.format(unservable=unservable, write=write))
        info = site / f"deepspec_{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: deepspec-{module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[deepspec]\n{module} = {module}\n")

    return make
