"""Mistakes users make: each ends with exit code 2 and a message that says where, what, and what to do; no traceback."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from deepspec_core.cache.manifest_digest import sealed
from deepspec_core.cli.main import main

Says = Any


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Says:
    """says(arguments, *parts): the command fails as a user's mistake and its message holds every part."""

    def check(arguments: list[str], *parts: str) -> None:
        assert main(arguments) == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        for part in parts:
            assert part in message, f"{part!r} is not in:\n{message}"

    return check


def _smoke(path: Path, *overrides: str) -> list[str]:
    return ["run", str(path), "--smoke", *(word for text in overrides for word in ("--set", text))]


def _results(path: Path) -> Path:
    return path.parent / "runs" / "quickstart-dflash-smoke"


def test_unknown_keys_misspelled_types_and_strings_for_numbers_come_all_at_once(run_file: Path, says: Says) -> None:
    text = run_file.read_text().replace("lr = 4e-3", 'lr = "4e-3"').replace('type = "dflash"', 'type = "dflahs"')
    run_file.write_text(text.replace("epochs =", "epoch ="))
    says(
        ["run", str(run_file)],
        "3 problems",
        "train.lr",
        "4e-3",
        "a number",
        "draft.type",
        "dflash",
        "train.epoch",
        "epochs",
    )
    assert not (run_file.parent / "runs").exists()


def test_missing_run_file(tmp_path: Path, run_file: Path, says: Says) -> None:
    says(["run", str(tmp_path / "trian.toml")], "no such run file", "train.toml")


def test_missing_data_file(run_file: Path, says: Says) -> None:
    (run_file.parent / "chats.jsonl").write_text("{}\n")
    says(_smoke(run_file, 'data.sources=[{path = "chat.jsonl"}]'), "chat.jsonl", "chats.jsonl")


def test_target_directory_without_config(run_file: Path, says: Says) -> None:
    (run_file.parent / "empty").mkdir()
    says(_smoke(run_file, "target.model=empty"), "no config.json", str(run_file.parent / "empty"))


def test_target_of_a_family_nobody_covers(run_file: Path, says: Says) -> None:
    folder = run_file.parent / "strange"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen33"}))
    says(_smoke(run_file, "target.model=strange"), "qwen33", "qwen3")


def test_target_of_a_family_whose_plugin_is_left_out(run_file: Path, says: Says) -> None:
    text = run_file.read_text().replace("builtin:tiny-dialogues", "chats.jsonl")
    run_file.write_text(text.replace("builtin:tiny-qwen3", "target"))
    (run_file.parent / "chats.jsonl").write_text('{"turns": ["Hello"]}\n')
    shutil.copytree(Path(__file__).parent / "parity" / "qwen3-target", run_file.parent / "target")
    says([*_smoke(run_file), "--no-plugin", "deepspec-targets"], "qwen3", "deepspec-targets")


@pytest.mark.parametrize(
    ("layers", "problem"),
    [("[1, 3, 11]", "the last decoder layer"), ("[1, 40]", "out of range"), ("[3, 1]", "target.layers")],
)
def test_taps_a_target_does_not_have(run_file: Path, says: Says, layers: str, problem: str) -> None:
    says(_smoke(run_file, f"target.layers={layers}"), problem, "target.layers")
    assert not (run_file.parent / "runs").exists()


def _with_foreign_cache(finished_copy: Path) -> list[str]:
    """A run of another name that is pointed at the finished run's cache."""
    settings = ["run.output=runs/other", 'run.stages=["train"]', f"cache.path={_results(finished_copy) / 'cache'}"]
    return _smoke(finished_copy, *settings)


@pytest.mark.slow
def test_a_cache_may_be_shared_between_runs(finished_copy: Path) -> None:
    assert main(_with_foreign_cache(finished_copy)) == 0


def test_cache_of_other_taps_or_another_target(finished_copy: Path, says: Says) -> None:
    arguments = _with_foreign_cache(finished_copy)
    says([*arguments, "--set", "target.layers=[1, 2, 3, 7, 9]"], "taps", "(2, 4, 6, 8, 10)", "(1, 2, 3, 7, 9)")
    manifest = _results(finished_copy) / "cache" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["header"]["target"] = "somebody/else"
    manifest.write_text(json.dumps(sealed(content)))
    says(arguments, "target", "somebody/else", "builtin:tiny-qwen3")


def test_half_written_cache(finished_copy: Path, says: Says) -> None:
    record = _results(finished_copy) / "cache" / "stage.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "complete": False}))
    says(
        [*_smoke(finished_copy), "--stages", "train", "--force", "train"],
        "needs the results of `cache`",
        "did not finish",
    )
    manifest = record.with_name("manifest.json")
    manifest.write_text(json.dumps(sealed({**json.loads(manifest.read_text()), "complete": False})))
    says(_with_foreign_cache(finished_copy), "unfinished", "samples in")


def test_full_disk_is_noticed_before_writing(finished_copy: Path, says: Says, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(finished_copy)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    only_cache = ["--force", "cache", "--stages", "cache"]
    says([*_smoke(finished_copy), *only_cache], "no room for the cache", "10.0 kB free", "cache.dtype")
    says([*_smoke(finished_copy), "--force", "regenerate"], "no room for a checkpoint", "10.0 kB free")
    assert not list((_results(finished_copy) / "cache").glob("shard-*"))


def _install(folder: Path, name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin as a distribution of its own, found beside the installed ones."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"deepspec_{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: deepspec-{name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[deepspec]\n{name} = {name}\n")
    monkeypatch.syspath_prepend(str(folder))


def test_plugin_that_raises_on_import(
    run_file: Path, tmp_path: Path, says: Says, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    _install(site, "shaky", "raise RuntimeError('no luck today')\n", monkeypatch)
    assert main(["plugins"]) == 0
    listed = capsys.readouterr().out
    assert "broken" in listed
    assert "no luck today" in listed
    # It stops only a run that needs it.
    assert main(["config", "check", str(run_file)]) == 0
    says(["config", "check", str(run_file), "--set", "draft.type=shaky"], "shaky", "no luck today")


def test_two_plugins_offering_one_name(
    run_file: Path, tmp_path: Path, says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    code = (
        "from deepspec_core.plugins.hooks import hookimpl\n"
        "from deepspec_core.plugins.specs import ComponentSpec\n"
        "@hookimpl\n"
        "def deepspec_losses():\n"
        "    return [ComponentSpec(name='ce', summary='Mine.', build='mine:Loss')]\n"
    )
    _install(site, "rival", code, monkeypatch)
    says(["config", "check", str(run_file)], "ce", "deepspec-core", "deepspec-rival", "--no-plugin")
    assert main(["config", "check", str(run_file), "--no-plugin", "rival"]) == 0


def _truncate(path: Path) -> None:
    content = path.read_bytes()
    # Hard links would damage the other name of the file too.
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


def test_corrupt_draft_checkpoint(finished_copy: Path, says: Says) -> None:
    _truncate(_results(finished_copy) / "draft" / "model.safetensors")
    draft = str(_results(finished_copy) / "draft")
    says([*_smoke(finished_copy), "--force", "evaluate"], "finished draft changed", draft, "as the stage left it")


def test_corrupt_training_state(finished_copy: Path, says: Says) -> None:
    folder = _results(finished_copy) / "train"
    newest = max((folder / "checkpoints").iterdir())
    for path in (newest / "state").glob("*.safetensors"):
        _truncate(path)
    record = folder / "stage.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "complete": False}))
    says([*_smoke(finished_copy), "--stages", "train"], str(newest), "fix:")


def test_setting_changed_on_a_finished_stage(finished_copy: Path, says: Says) -> None:
    says(_smoke(finished_copy, "draft.block_size=4"), "`draft.block_size` changed", "5", "4", "--force train")
    says(_smoke(finished_copy, "regenerate.temperature=0.5"), "`regenerate.temperature` changed", "--force regenerate")
