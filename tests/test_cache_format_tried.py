"""A cache format that does not keep what it is given is refused before the first stage. So is nothing else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from attrs import evolve

from deepspec_core.cache.hdf5 import HDF5Format
from deepspec_core.cli.main import main
from deepspec_core.contracts.cache import CacheHeader, CacheWriter
from deepspec_core.contracts.draft import Sample
from deepspec_core.pipeline.trying_cache import lost_by
from deepspec_core.testing.random_batches import features_of

HEADER = CacheHeader(
    target="t", revision="", adapter="tiny", taps=(0, 2), hidden_size=8, vocab_size=16, dtype="float32", tokenizer="",
    template="", max_length=64, source="", plugins={},
)  # fmt: skip

OFFERS = """
    from deepspec_core.plugins import BuiltinSpec, ComponentSpec, hookimpl

    @hookimpl
    def deepspec_cache_formats():
        return [ComponentSpec(name="lossy", summary="", build="lossy_parts:Lossy")]

    @hookimpl
    def deepspec_builtins():
        return [BuiltinSpec(name="grown", summary="", build="lossy_parts:grown", kind="model")]
"""
PARTS = """
    import shutil, tempfile
    from pathlib import Path

    import torch
    from attrs import evolve
    from deepspec_core.cache.hdf5 import HDF5Format

    class Reader:
        def __init__(self, inner):
            self.inner = inner

        def __len__(self):
            return len(self.inner)

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __getitem__(self, index):
            sample = self.inner[index]
            return evolve(sample, loss_mask=~sample.loss_mask)

    class Lossy(HDF5Format):
        def open(self, path, expect):
            return Reader(super().open(path, expect))

    def grown():
        import deepspec_targets

        assert torch.ones(2).sum().item() == 2, "made under a mode without numbers"
        folder = Path(tempfile.mkdtemp()) / "grown"
        shutil.copytree(Path(deepspec_targets.__file__).parent / "builtin" / "tiny-qwen3", folder)
        return folder
"""


@pytest.fixture
def lossy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package `fake-lossy` 1.0 as if installed."""
    folder = tmp_path / "installed"
    info = folder / "fake_lossy-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-lossy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[deepspec]\nlossy = lossy_offers\n")
    (folder / "lossy_offers.py").write_text(dedent(OFFERS))
    (folder / "lossy_parts.py").write_text(dedent(PARTS))
    monkeypatch.syspath_prepend(str(folder))
    for module in ("lossy_offers", "lossy_parts"):
        monkeypatch.delitem(sys.modules, module, raising=False)


def test_a_format_that_loses_something(lossy: None, run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["features.mode=cached", "cache.format=lossy", 'run.stages=["cache", "train"]']
    arguments = [word for text in overrides for word in ("--set", text)]
    assert main(["run", str(run_file), "--smoke", *arguments]) == 2
    seen = capsys.readouterr()
    assert "cache format 'lossy' does not preserve a sample" in seen.err
    assert "fake-lossy" in seen.err
    assert "loss_mask: tensor([ True, False, False])" in seen.err
    assert "starting" not in seen.out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3"])
def test_cores_own_format_keeps_all(dtype: str) -> None:
    assert lost_by(HDF5Format(), evolve(HEADER, dtype=dtype)) is None
    assert lost_by(HDF5Format(), evolve(HEADER, dtype=dtype, taps=(), vocab_size=2, max_length=3)) is None


class Other(HDF5Format):
    def __init__(self, **answers: Any) -> None:
        super().__init__()
        for name, answer in answers.items():
            setattr(self, name, answer)


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ({"header": lambda path: None}, "header(): None"),
        ({"verify": lambda path: ["damaged"]}, "verify(): damaged"),
        ({"bytes_per_token": lambda header: 0.5}, "bytes_per_token(): 0.5"),
    ],
)
def test_each_answer_is_looked_at(answers: dict[str, Any], says: str) -> None:
    assert lost_by(Other(**answers), HEADER) == says


class Mixed:
    """A reader that has the features of the first sample of a shard for all."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __getitem__(self, index: int) -> Sample:
        own, first = self.inner[index], features_of(self.inner[index - index % 2])
        length = len(own.input_ids)
        return evolve(own, features=evolve(first, hidden=first.hidden[:length], last_hidden=first.last_hidden[:length]))


def test_one_sample_is_not_taken_for_another() -> None:
    class Confused(HDF5Format):
        def open(self, path: Path, expect: CacheHeader | None) -> Any:
            return Mixed(super().open(path, expect))

    assert lost_by(Confused(), HEADER) == "hidden: other numbers"


class Changed:
    """A writer that stores another sample than it is given."""

    def __init__(self, inner: CacheWriter, change: Callable[[Sample], Sample]) -> None:
        self.inner, self.change = inner, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def write(self, sample: Sample) -> None:
        self.inner.write(self.change(sample))


def clamped(sample: Sample) -> Sample:
    found = features_of(sample)
    return evolve(sample, features=evolve(found, last_hidden=found.last_hidden.clamp(-8, 8)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda one: evolve(one, input_ids=one.input_ids.to(torch.uint8).long()), "input_ids"),
        (lambda one: evolve(one, input_ids=one.input_ids.to(torch.int16).long()), "input_ids"),
        (lambda one: evolve(one, original_length=one.original_length % 2**16), "original_length 0"),
        (clamped, "last_hidden: other numbers"),
    ],
)
def test_numbers_in_too_few_bits(change: Callable[[Sample], Sample], says: str) -> None:
    class Narrow(HDF5Format):
        def create(self, path: Path, header: CacheHeader, **options: Any) -> Any:
            return Changed(super().create(path, header, **options), change)

    found = lost_by(Narrow(), evolve(HEADER, vocab_size=151_936, max_length=2**16))
    assert says in str(found)


@pytest.mark.parametrize("command", ["run", "estimate"])
def test_a_target_that_is_made_on_first_use(lossy: None, run_file: Path, command: str) -> None:
    more = ["--dry-run"] if command == "run" else []
    assert main([command, str(run_file), *more, "--set", 'target.model="builtin:grown"']) == 0
