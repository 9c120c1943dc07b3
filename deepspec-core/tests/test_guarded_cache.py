"""A plugin's cache format that fails in the middle of a run: its writers and readers too are told as the plugin's."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from plugin_on_path import install

from deepspec_core.contracts.cache import CacheFormat, CacheHeader, MergingWriter
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.errors import CacheError, PluginError
from deepspec_core.plugins.discovery import load_plugins

PARTS = """
    from deepspec_core.cache.hdf5 import HDF5Format
    from deepspec_core.plugins import ComponentSpec, hookimpl

    FAILS = ""

    @hookimpl
    def deepspec_cache_formats():
        return [ComponentSpec(name="frail", summary="", build="frail_parts:Frail")]

    def fail(*_):
        raise KeyError("of the frail one")

    class Part:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return fail if name == FAILS else getattr(self.inner, name)

        def __len__(self):
            return len(self.inner)

        def __getitem__(self, index):
            if FAILS == "read":
                raise KeyError("of the frail one")
            return self.inner[index]

        def __reduce__(self):
            return Part, (self.inner,)

    class Frail(HDF5Format):
        def create(self, *arguments, **options):
            if FAILS == "create":
                raise KeyError("of the frail one")
            writer = super().create(*arguments, **options)
            return Part(writer) if FAILS in ("write", "finish") else writer

        def open(self, *arguments):
            return Part(super().open(*arguments))

        def verify(self, *arguments, **options):
            return [][0] if FAILS == "verify" else super().verify(*arguments, **options)
"""
HEADER = CacheHeader(
    target="t", revision="", adapter="tiny", taps=(0, 2), hidden_size=4, vocab_size=16, dtype="float32", tokenizer="",
    template="", max_length=64, source="", plugins={},
)  # fmt: skip


@pytest.fixture
def frail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], CacheFormat]:
    """frail(name): the format, whose member of that name fails from now on."""
    install(tmp_path / "installed", monkeypatch, "frail-parts", dedent(PARTS))
    found: CacheFormat = load_plugins().registry.cache_format("frail")

    def failing(name: str) -> CacheFormat:
        monkeypatch.setattr("frail_parts.FAILS", name)
        return found

    return failing


def _filled(cache_format: CacheFormat, path: Path) -> None:
    writer = cache_format.create(path, HEADER)
    for number in range(2):
        features = TargetFeatures(hidden=torch.rand(3, 8), last_hidden=torch.rand(3, 4))
        ids, mask = torch.arange(3), torch.arange(3) > 0
        writer.write(Sample(id=str(number), input_ids=ids, loss_mask=mask, original_length=3, features=features))
    writer.finish()


@pytest.mark.parametrize("name", ["create", "write", "finish", "verify", "read", "tokens_of", "ids", "of_taps"])
def test_what_fails_is_named(frail: Callable[[str], CacheFormat], tmp_path: Path, name: str) -> None:
    path = tmp_path / "cache"
    if name in ("create", "write", "finish"):
        with pytest.raises(PluginError, match=r"cache format 'frail' of frail-parts 1\.0 failed"):
            _filled(frail(name), path)
        return
    _filled(frail(""), path)
    asked: dict[str, Callable[[Any], Any]] = {
        "verify": lambda _: frail(name).verify(path),
        "read": lambda reader: reader[1],
        "tokens_of": lambda reader: reader.tokens_of(1),
        "ids": lambda reader: reader.ids(),
        "of_taps": lambda reader: reader.of_taps((2,)),
    }
    reader = frail(name).open(path, HEADER)
    with pytest.raises(PluginError, match=r"cache format 'frail' of frail-parts 1\.0 failed"):
        asked[name](reader)


def test_what_does_not_fail_is_as_it_was(frail: Callable[[str], CacheFormat], tmp_path: Path) -> None:
    path, cache_format = tmp_path / "cache", frail("")
    assert isinstance(cache_format, CacheFormat)
    assert isinstance(cache_format.create(path, HEADER), MergingWriter)
    with pytest.raises(CacheError, match="unfinished"):
        frail("").open(path, HEADER)
    _filled(cache_format, tmp_path / "third")
    reader = cache_format.open(tmp_path / "third", HEADER)
    sent = pickle.loads(pickle.dumps(reader))  # as to a loader worker
    assert (sent.ids(), len(sent), sent.digest) == (["0", "1"], 2, reader.digest)
    assert sent.of_taps((2,))[1].features.hidden.shape == (3, 4)
    frail("read")
    with pytest.raises(PluginError, match="frail"):
        sent[0]
