"""The export stage: whole folders, refusals before the first stage, and plugins that do not do what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deepspec_core.checkpoints.opening import draft_adapter
from deepspec_core.checkpoints.published import load_draft
from deepspec_core.cli.main import main
from deepspec_core.plugins.discovery import load_plugins

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
    def unservable(self, description):
        return {unservable}

    def write(self, draft, out):
        {write}
"""
COPY = (
    'save_file({name: value.contiguous().clone() for name, value in draft.state_dict().items()}, out / "w.safetensors")'
    '; (out / "config.json").write_text(json.dumps(dict(draft.describe().config)))'
)


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """offer(unservable=..., write=...): a plugin with the format "plain" for DFlash, its two answers as code."""
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


def _arguments(run_file: Path) -> list[str]:
    stages = '["regenerate", "cache", "train", "evaluate", "export"]'
    return ["run", str(run_file), "--smoke", "--set", f"run.stages={stages}", "--set", 'export.to=["plain"]']


def _folder(run_file: Path) -> Path:
    return run_file.parent / "runs" / "quickstart-dflash-smoke"


def test_a_format_is_written_whole_and_once(
    finished_copy: Path, offer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    offer()
    assert main(_arguments(finished_copy)) == 0
    out = _folder(finished_copy) / "export" / "plain"
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "w.safetensors"]
    assert json.loads((out / "config.json").read_text())["block_size"] == 5
    assert [path.name for path in out.parent.glob(".*")] == []
    capsys.readouterr()
    assert main(_arguments(finished_copy)) == 0
    assert "export: already complete" in capsys.readouterr().out
    # Another draft in its place is noticed.
    registry = load_plugins().registry
    folder = _folder(finished_copy) / "draft"
    draft = load_draft(folder, registry=registry, adapter=draft_adapter(folder, registry=registry))
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4:] = b"\x00\x00\x80\x3f"
    weights.unlink()
    weights.write_bytes(content)
    assert main([*_arguments(finished_copy), "--stages", "export"]) == 2
    assert "The run's finished draft changed" in capsys.readouterr().err
    assert draft.describe().algorithm == "dflash"


def test_an_interrupted_export_is_written_again(finished_copy: Path, offer: Any) -> None:
    offer(write=f"{COPY}; import os; (out / 'half').touch(); os._exit(9)")
    environment = {"PYTHONPATH": str(finished_copy.parents[1] / "site")}
    command = [sys.executable, "-m", "deepspec_core", *_arguments(finished_copy)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, check=False)
    assert done.returncode == 9
    export = _folder(finished_copy) / "export"
    assert not (export / "plain").exists()
    offer()
    assert main(_arguments(finished_copy)) == 0
    assert sorted(path.name for path in (export / "plain").iterdir()) == ["config.json", "w.safetensors"]


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ({"unservable": '"it has no " + description.algorithm'}, ("cannot be exported to plain", "it has no dflash")),
        ({"writer": ""}, ("'plain (dflash)'", "cannot be loaded")),
        ({"writer": "class Writer:\n    pass\n"}, ("is no exporter", "unservable")),
    ],
)
def test_what_cannot_be_exported_is_refused_before_the_first_stage(
    run_file: Path, offer: Any, answers: dict[str, str], says: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    offer(**answers)
    assert main(_arguments(run_file)) == 2
    seen = capsys.readouterr()
    assert "regenerate" not in seen.out.replace("threads: regenerate", "")
    assert "Traceback" not in seen.err
    for part in says:
        assert part in seen.err


@pytest.mark.parametrize(
    ("write", "says"),
    [("pass", "wrote nothing"), ("raise KeyError('q_proj')", "the export to plain failed")],
)
def test_a_plugin_that_fails_leaves_no_folder(
    finished_copy: Path, offer: Any, write: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(write=write)
    assert main(_arguments(finished_copy)) == 2
    seen = capsys.readouterr().err
    assert says in seen
    assert "Traceback" not in seen
    assert not (_folder(finished_copy) / "export" / "plain").exists()


def test_an_unknown_format_is_refused_by_config_check(
    run_file: Path, offer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    offer()
    assert main(["config", "check", str(run_file), "--set", 'export.to=["plane"]']) == 2
    assert "plain" in capsys.readouterr().err
    assert main(["config", "check", str(run_file), "--set", 'run.stages=["train", "export"]']) == 2
    assert "export.to" in capsys.readouterr().err
