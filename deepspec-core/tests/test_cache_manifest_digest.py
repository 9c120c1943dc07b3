"""A manifest that was edited is refused wherever a cache is opened; one of an earlier version is read, and says so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspec_core.cache.binary_v2 import BinaryV2Format
from deepspec_core.cache.hdf5 import HDF5Format
from deepspec_core.cache.manifest_digest import reseal
from deepspec_core.cache.sharded import ShardedFormat, ShardedReader
from deepspec_core.cli.main import main
from deepspec_core.contracts.cache import CacheHeader
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.errors import CacheError

HEADER = CacheHeader(
    target="t", revision="r", adapter="a", taps=(2, 4), hidden_size=4, vocab_size=50, dtype="bfloat16", tokenizer="k",
    template="m", max_length=64, source="s", plugins={"core": "1"}, split="by prompt",
)  # fmt: skip
FORMATS = {"manifest.json": HDF5Format(), "deepspec.json": BinaryV2Format()}


def _fill(folder: Path, cache_format: ShardedFormat, numbers: range) -> Path:
    """A finished cache with these samples more; two a shard, all of one length."""
    writer = cache_format.create(folder, HEADER, shard_samples=2)
    for number in numbers:
        draw = torch.Generator().manual_seed(number)
        hidden, last = torch.randn(5, 8, generator=draw).bfloat16(), torch.randn(5, 4, generator=draw).bfloat16()
        ids, features = torch.arange(5), TargetFeatures(hidden=hidden, last_hidden=last)
        writer.write(
            Sample(id=f"{number}", input_ids=ids, loss_mask=ids > 1, original_length=5, features=features),
        )
    writer.note_samples_with(7, 1)
    writer.finish()
    return folder


def _edit(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _without_digest(path: Path) -> None:
    """As an earlier version wrote it."""
    _edit(path, lambda content: content.pop("digest"))


def _swap_ids(content: Any) -> None:
    shards = content["shards"]
    shards[0]["ids"], shards[1]["ids"] = shards[1]["ids"], shards[0]["ids"]


EDITS: dict[str, Callable[[Any], object]] = {
    "taps": lambda content: content["header"].update(taps=[1, 3]),
    "vocab_size": lambda content: content["header"].update(vocab_size=60),
    "adapter": lambda content: content["header"].update(adapter="nosuch"),
    "split": lambda content: content["header"].pop("split"),
    "ids": _swap_ids,
    "samples_with": lambda content: content.update(samples_with={"7": 3}),
    "digest": lambda content: content.update(digest=None),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_manifest_is_refused_wherever_it_is_read(tmp_path: Path, name: str, edit: str) -> None:
    cache_format = FORMATS[name]
    folder = _fill(tmp_path, cache_format, range(4))
    assert cache_format.verify(folder) == []
    _edit(folder / name, EDITS[edit])
    uses: list[Callable[[], object]] = [
        lambda: cache_format.open(folder, None),
        lambda: cache_format.header(folder),
        lambda: cache_format.verify(folder),
        lambda: cache_format.create(folder, HEADER),
    ]
    for use in uses:
        with pytest.raises(CacheError, match="has changed since it was written") as caught:
            use()
        error = caught.value
        assert str(folder / name) in str(error)
        assert error.found
        assert "Restore the file, or make the cache again" in str(error)


def test_a_manifest_that_is_laid_out_otherwise_says_the_same(tmp_path: Path) -> None:
    folder = _fill(tmp_path, HDF5Format(), range(4))
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(dict(reversed(content.items())), indent=1))
    assert HDF5Format().open(folder, HEADER).has_digest


def test_an_edited_part_is_not_merged(tmp_path: Path) -> None:
    part = _fill(tmp_path / "part", HDF5Format(), range(4))
    _edit(part / "manifest.json", _swap_ids)
    writer = HDF5Format().create(tmp_path / "cache", HEADER)
    with pytest.raises(CacheError, match="has changed since it was written"):
        writer.absorb(part)
    writer.close()


def _merged(folder: Path, part: Path) -> ShardedReader:
    writer = HDF5Format().create(folder, HEADER)
    writer.absorb(part)
    writer.finish()
    return HDF5Format().open(folder, HEADER)


def test_what_was_never_checked_is_given_no_digest(tmp_path: Path) -> None:
    """Neither where an old cache is continued, nor where an old part is merged."""
    folder, part = (_fill(tmp_path / name, HDF5Format(), range(2)) for name in ("cache", "part"))
    for path in (folder, part):
        _without_digest(path / "manifest.json")
    assert HDF5Format().verify(folder) == []
    continued = HDF5Format().open(_fill(folder, HDF5Format(), range(2, 4)), HEADER)
    assert (len(continued), continued.has_digest) == (4, False)
    assert not _merged(tmp_path / "of an old part", part).has_digest
    assert _merged(tmp_path / "of a new part", _fill(tmp_path / "new", HDF5Format(), range(2))).has_digest


def test_the_commands_refuse_an_edited_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _fill(tmp_path / "cache", HDF5Format(), range(4))
    _edit(folder / "manifest.json", EDITS["taps"])
    out = tmp_path / "out"
    for command in (["info"], ["verify"], ["convert", "--to", "deepspec-v2", "--out", str(out)]):
        assert main(["cache", command[0], str(folder), *command[1:]]) == 2
        seen = capsys.readouterr().err
        assert "The cache's manifest has changed since it was written" in seen
        assert "manifest.json" in seen
    assert not out.exists()
    # Edited on purpose and sealed again, it is as good as any.
    reseal(folder / "manifest.json")
    assert main(["cache", "verify", str(folder)]) == 0
    assert "unchanged since it was written" in capsys.readouterr().out


def test_the_commands_say_that_an_old_manifest_cannot_be_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, told = _fill(tmp_path / "cache", HDF5Format(), range(4)), "the manifest has no digest"
    assert main(["cache", "info", str(folder), "--json"]) == 0
    seen = capsys.readouterr()
    assert (json.loads(seen.out)["has_digest"], told in seen.err) == (True, False)
    _without_digest(folder / "manifest.json")
    assert main(["cache", "info", str(folder), "--json"]) == 0
    seen = capsys.readouterr()
    assert (json.loads(seen.out)["has_digest"], told in seen.err) == (False, True)
    assert main(["cache", "verify", str(folder)]) == 0
    out = capsys.readouterr().out
    assert told in out
    assert "unchanged since it was written" not in out
    assert main(["cache", "convert", str(folder), "--to", "deepspec-v2", "--out", str(tmp_path / "v2")]) == 0
    assert told in capsys.readouterr().err
