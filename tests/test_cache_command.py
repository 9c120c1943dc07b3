"""`deepspec cache`: info, verify, convert and adopt, on the cache of a finished run."""

import json
import shutil
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from plugin_on_path import install

from deepspec_core.cache import estimate
from deepspec_core.cache.sharded import ShardedFormat
from deepspec_core.cli.main import main


@pytest.fixture(scope="module")
def cached(finished: Path) -> Path:
    """The cache of the finished run. It is only read."""
    return next(finished.parent.glob("runs/*/cache"))


@pytest.fixture
def converted(cached: Path, tmp_path: Path) -> Path:
    """The same in the published layout."""
    assert main(["cache", "convert", str(cached), "--to", "deepspec-v2", "--out", str(tmp_path / "v2")]) == 0
    return tmp_path / "v2"


def test_info_says_what_is_there(cached: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "info", str(cached), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    manifest = json.loads((cached / "manifest.json").read_text())
    lengths = [length for shard in manifest["shards"] for length in shard["lengths"]]
    assert (facts["format"], facts["samples"], facts["tokens"]) == ("hdf5", len(lengths), sum(lengths))
    assert facts["taps"] == manifest["header"]["taps"]
    assert facts["bytes"] == sum(path.stat().st_size for path in cached.iterdir())
    assert main(["cache", "info", str(cached)]) == 0
    said = capsys.readouterr().out
    assert f"{sum(lengths):,}" in said
    assert ["has", "digest", "yes"] in [line.split() for line in said.splitlines()]


def test_the_format_is_found_out(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "verify", str(converted)]) == 0
    assert "unchanged since it was written" in capsys.readouterr().out
    content = bytearray((converted / "samples.idx").read_bytes())
    content[9] ^= 1
    (converted / "samples.idx").write_bytes(content)
    assert main(["cache", "verify", str(converted)]) == 2
    assert "samples.idx" in capsys.readouterr().err


def test_a_damaged_cache_is_not_converted(cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(cached, damaged)
    shard = next(damaged.glob("*.h5"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main(["cache", "convert", str(damaged), "--to", "deepspec-v2", "--out", str(tmp_path / "v2")]) == 2
    assert shard.name in capsys.readouterr().err
    assert not (tmp_path / "v2").exists()


def test_no_room_for_the_new_cache_is_said_before_the_old_one_is_read(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ShardedFormat, "verify", lambda *_, **__: pytest.fail("the whole cache was read first"))
    monkeypatch.setattr(estimate, "free_bytes", lambda _: 1000)
    assert main(["cache", "convert", str(cached), "--to", "hdf5", "--out", str(tmp_path / "new")]) == 2
    assert "The disk has no room for the cache" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


FAILS = ("def make():\n    raise KeyError(1)", "class make:\n    def header(self, _):\n        {}[1]")


@pytest.mark.parametrize("fails", FAILS)
def test_a_format_that_fails_hides_no_other_ones_cache(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: str
) -> None:
    offers = """
        from deepspec_core.plugins import ComponentSpec, hookimpl

        @hookimpl
        def deepspec_cache_formats():
            return [ComponentSpec(name="aaa", summary="", build="fake_format:make")]
    """
    install(tmp_path / "installed", monkeypatch, "fake-format", f"{dedent(offers)}\n{fails}\n")
    monkeypatch.delitem(sys.modules, "fake_format", raising=False)
    assert main(["cache", "info", str(cached)]) == 0
    assert main(["cache", "info", str(tmp_path)]) == 2
    assert "'aaa' of fake-format 1.0 failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "zarr", "--out", "x"], "zarr"),
        (["--to", "deepspec-v2", "--dtype", "float32", "--out", "x"], "bfloat16"),
        (["--to", "hdf5", "--out", "."], "its own folder"),
    ],
)
def test_what_cannot_be_converted(
    cached: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(cached, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(ShardedFormat, "verify", lambda *_, **__: pytest.fail("the whole cache was read first"))
    assert main(["cache", "convert", str(folder), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("info", "verify"):
        assert main(["cache", command, str(tmp_path)]) == 2
        assert "There is no cache" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_trains_on_a_converted_and_on_an_adopted_cache(
    finished: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same features in the same order make the same draft, whoever wrote the files."""
    original = next(finished.parent.glob("runs/*/draft/model.safetensors")).read_bytes()

    def train(name: str) -> int:
        keys = [f'cache.path="{converted}"', 'cache.format="deepspec-v2"', f'run.output="{tmp_path / name}"']
        keys += ["run.threads=1", 'run.stages=["train"]']
        sets = [part for key in keys for part in ("--set", key)]
        return main(["run", str(finished), "--smoke", *sets])

    assert train("converted") == 0
    assert (tmp_path / "converted-smoke" / "draft" / "model.safetensors").read_bytes() == original

    (converted / "deepspec.json").unlink()
    assert train("foreign") == 2
    assert "deepspec cache adopt" in capsys.readouterr().err
    assert main(["cache", "adopt", str(converted), str(finished), "--set", "data.max_length=64"]) == 2
    assert "max_length" in capsys.readouterr().err
    assert main(["cache", "adopt", str(converted), str(finished)]) == 0
    assert "adopted for builtin:tiny-qwen3" in capsys.readouterr().out
    assert train("adopted") == 0
