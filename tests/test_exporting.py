"""The export stage: whole folders, refusals before the first stage, and plugins that do not do what they say."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exporter_plugin import COPY

from deepspec_core.checkpoints.exports import Format
from deepspec_core.checkpoints.opening import draft_adapter
from deepspec_core.checkpoints.published import load_draft
from deepspec_core.cli.main import main
from deepspec_core.errors import ExportError, StageError
from deepspec_core.plugins.discovery import load_plugins

FAILS_TO_BUILD = """
class Writer:
    def __init__(self):
        raise OSError("no engine")
"""


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


@pytest.mark.slow
def test_an_interrupted_export_is_written_again(finished_copy: Path, offer: Any) -> None:
    offer(write=f"{COPY}; import os; (out / 'half').touch(); os._exit(9)")
    paths = [str(finished_copy.parents[1] / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths)}
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
        (
            {"unservable": '"it has no " + facts.description.algorithm'},
            ("cannot be exported to plain", "it has no dflash"),
        ),
        ({"unservable": "facts.heads"}, ("failed to check the draft", "_writer.py:7")),
        ({"writer": ""}, ("'plain (dflash)'", "cannot be loaded")),
        ({"writer": "class Writer:\n    pass\n"}, ("does not make an exporter", "unservable")),
        ({"writer": FAILS_TO_BUILD}, ("cannot be built", "no engine")),
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
    [
        ("pass", "wrote nothing"),
        ("raise KeyError('q_proj')", "the export to plain failed"),
        ("open('/no/such/template')", "the export to plain failed"),
        ("raise SystemExit(0)", "the export to plain failed"),
        (f"{COPY}; (out.parent / 'extra').touch()", "extra beside it"),
        (f"{COPY}; (out / 'vocabulary').symlink_to(out.parent)", "vocabulary, a link"),
        (f"{COPY}; import os; os.link(out / 'w.safetensors', out.parents[2] / 'shared')", "w.safetensors, a link"),
        (f"{COPY}; import pickle; (out / 'notes').write_bytes(pickle.dumps(1, 0))", "contains pickles"),
        ("out.rmdir()", "the folder is gone"),
        (f"{COPY}; import os; os.chdir('/')", "changed the current folder"),
    ],
)
def test_a_plugin_that_fails_leaves_no_folder(
    finished_copy: Path, offer: Any, write: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(write=write)
    assert main(_arguments(finished_copy)) == 2
    seen = capsys.readouterr().err
    assert says in seen
    assert "Traceback" not in seen
    assert [path.name for path in (_folder(finished_copy) / "export").iterdir() if path.name != "stage.json"] == []


def test_what_is_in_the_place_of_an_export_stays(
    finished_copy: Path, offer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    offer()
    mine = _folder(finished_copy) / "export" / "plain"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert main(_arguments(finished_copy)) == 2
    assert "the export's folder exists already" in capsys.readouterr().err
    assert mine.read_text() == "mine"


def test_an_exporter_that_changes_the_draft_and_the_facts_changes_no_other_export(
    finished_copy: Path, offer: Any
) -> None:
    spoil = "[weight.data.mul_(0.5) for weight in draft.parameters()]; facts.config['max_position_embeddings'] = 7"
    arguments = _arguments(finished_copy)
    offer(write=f"{COPY}; {spoil}; [result.clear() for result in facts.results]")
    assert main([*arguments[:-1], 'export.to=["plain", "deepspec"]']) == 0
    exports = _folder(finished_copy) / "export"
    found = {path.name: path.read_bytes() for path in (exports / "deepspec").iterdir()}
    offer()
    assert main([*arguments[:-1], 'export.to=["deepspec"]', "--force", "export"]) == 0
    assert found == {path.name: path.read_bytes() for path in (exports / "deepspec").iterdir()}


class _Writes:
    """An exporter that calls something while it writes."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        self.meanwhile = meanwhile

    def unservable(self, facts: Any) -> None:
        return None

    def write(self, draft: Any, facts: Any, out: Path) -> None:
        (out / "file").write_text("mine")
        self.meanwhile()


def _write(out: Path, meanwhile: Callable[[], object] = lambda: None) -> None:
    nothing: Any = None
    Format(name="plain", package="a test", exporter=_Writes(meanwhile)).write(nothing, nothing, out)


def test_two_exports_to_one_folder_do_not_mix(tmp_path: Path) -> None:
    out, raised = tmp_path / "out", []

    def again() -> None:
        with pytest.raises(StageError, match="Another process writes this export") as error:
            _write(out)
        raised.append(error)

    _write(out, again)
    assert len(raised) == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]

    second = tmp_path / "second"
    with pytest.raises(ExportError, match="came into being while"):
        _write(second, lambda: shutil.copytree(out, second))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "second"]


def test_what_has_the_name_of_an_unfinished_export_stays(tmp_path: Path) -> None:
    place = tmp_path / ".out.partial"
    place.write_text("mine")
    with pytest.raises(ExportError, match="taken by something else"):
        _write(tmp_path / "out")
    place.unlink()
    place.mkdir()
    (place / "mine").touch()
    with pytest.raises(ExportError, match="taken by something else"):
        _write(tmp_path / "out")
    # That of a killed process is used.
    (place / "mine").unlink()
    (place / ".lock").touch()
    (place / "out").mkdir()
    (place / "out" / "half").touch()
    _write(tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


def test_a_format_that_cannot_be_loaded_is_refused_by_config_check(
    run_file: Path, offer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(writer="")
    check = ["config", "check", str(run_file), "--set", 'export.to=["plain"]']
    assert main([*check, "--set", 'run.stages=["train", "evaluate", "export"]']) == 2
    seen = capsys.readouterr().err
    assert "cannot be loaded" in seen
    assert "export.to[0]" in seen
    assert main(check) == 0, "the run does not come to it"


def test_an_unknown_format_is_refused_by_config_check(
    run_file: Path, offer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    offer()
    assert main(["config", "check", str(run_file), "--set", 'export.to=["plane"]']) == 2
    assert "plain" in capsys.readouterr().err
    assert main(["config", "check", str(run_file), "--set", 'run.stages=["train", "export"]']) == 2
    assert "export.to" in capsys.readouterr().err
