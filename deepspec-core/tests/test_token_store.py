"""Tokens on disk: read as they were written, continued after a kill, damage told, and made anew from anything else."""

import json
import logging
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from deepspec_core.contracts.draft import Sample
from deepspec_core.data import token_store
from deepspec_core.data.digest_set import DigestSet, digest16
from deepspec_core.data.samples import HeldSamples
from deepspec_core.data.stored_samples import StoredSamples
from deepspec_core.data.token_store import Manifest, TokenStore
from deepspec_core.errors import DataError, StageError
from deepspec_core.locks import lock

# Conversation i has i % 3 samples: none, one or two.
CONVERSATIONS = 40
FACTS = {"the tokenizer": "a", "data.sources": ["x", 1]}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_store, "SHARD_SAMPLES", 6)


def _samples(number: int) -> list[Sample]:
    rng = np.random.default_rng(number)
    found = []
    for part in range(number % 3):
        length = int(rng.integers(1, 9))
        ids = torch.from_numpy(rng.integers(0, 50, length))
        mask = torch.from_numpy(rng.random(length) < 0.5)
        found.append(Sample(id=f"{99 - number}é#{part}", input_ids=ids, loss_mask=mask, original_length=length + part))
    return found


ALL = [sample for number in range(CONVERSATIONS) for sample in _samples(number)]


class Making:
    """Makes the samples that are missing, up to a kill, and counts how many conversations that took."""

    def __init__(self, *, killed_after: int | None = None) -> None:
        self.killed_after, self.made = killed_after, 0

    def __call__(self, manifest: Manifest) -> Iterator[tuple[list[Sample], Counter[str]]]:
        last = manifest.shards[-1] if manifest.shards else None
        counts: Counter[str] = Counter(last.counts if last else {})
        for number in range(last.conversations if last else 0, CONVERSATIONS):
            if self.made == self.killed_after:
                raise KeyboardInterrupt
            self.made += 1
            samples = _samples(number)
            counts["samples"] += len(samples)
            counts["empty"] += not samples
            yield samples, counts


def _fill(folder: Path, making: Making, facts: dict[str, object] | None = None) -> TokenStore:
    store = TokenStore(folder, facts or FACTS)
    store.fill(making, Counter(rows=CONVERSATIONS), lambda: None)
    return store


def _same(one: Sample, other: Sample) -> bool:
    return (
        (one.id, one.original_length) == (other.id, other.original_length)
        and torch.equal(one.input_ids, other.input_ids)
        and torch.equal(one.loss_mask, other.loss_mask)
    )


def _require_whole(store: TokenStore) -> StoredSamples:
    ready = store.ready()
    assert ready is not None
    samples, counts = ready
    assert len(samples) == len(ALL)
    assert all(_same(one, other) for one, other in zip(samples, ALL, strict=True))
    assert counts == {"samples": len(ALL), "empty": 14, "rows": CONVERSATIONS}
    return samples


def test_stored_samples_are_those_that_were_made(tmp_path: Path) -> None:
    samples, held = _require_whole(_fill(tmp_path, Making())), HeldSamples(ALL)
    assert len(list(tmp_path.glob("*.arrow"))) > 3
    assert list(samples.ids()) == list(held.ids())
    for order in ("lengths", "by_id", "longest_first"):
        np.testing.assert_array_equal(getattr(samples, order)(), getattr(held, order)())
    assert _same(samples[-1], ALL[-1])
    assert [one.id for one in samples[3:5]] == [one.id for one in ALL[3:5]]
    for token in range(51):
        found = [number for number, one in enumerate(ALL) if (one.input_ids == token).any()]
        assert samples.with_token(token).tolist() == found
    copy = pickle.dumps(samples)
    assert len(copy) < 40 * len(ALL) + 2000
    assert _same(pickle.loads(copy)[7], ALL[7])


def test_nothing_is_made_twice(tmp_path: Path) -> None:
    _fill(tmp_path, Making())
    again = Making()
    _require_whole(_fill(tmp_path, again))
    assert again.made == 0


@pytest.mark.parametrize("killed_after", [0, 1, 7, 13, 39])
def test_a_killed_writer_is_continued_at_its_last_whole_shard(tmp_path: Path, killed_after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        _fill(tmp_path, Making(killed_after=killed_after))
    (tmp_path / "tokens-00099.arrow.partial").write_bytes(b"torn")
    assert TokenStore(tmp_path, FACTS).ready() is None
    rest = Making()
    _require_whole(_fill(tmp_path, rest))
    # A shard of six samples is six or seven conversations.
    assert CONVERSATIONS - killed_after <= rest.made <= CONVERSATIONS - killed_after + 7
    assert not list(tmp_path.glob("*.partial"))


def _flip(path: Path, place: int = 300) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("a flipped byte", _flip, "checksum"),
    ("a truncated shard", lambda path: path.write_bytes(path.read_bytes()[:-8]), "bytes, expected"),
    ("a missing shard", lambda path: path.unlink(), "it is missing"),
    ("another shard", lambda path: path.write_bytes((path.parent / "tokens-00000.arrow").read_bytes()), "expected"),
]


@pytest.mark.parametrize(("damage", "says"), [pytest.param(do, says, id=name) for name, do, says in DAMAGE])
def test_damage_is_told_and_repaired_from_there(
    tmp_path: Path, damage: Callable[[Path], object], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    _fill(tmp_path, Making())
    damage(tmp_path / "tokens-00002.arrow")
    assert TokenStore(tmp_path, FACTS).ready() is None
    making = Making()
    with caplog.at_level(logging.WARNING, "deepspec"):
        _require_whole(_fill(tmp_path, making))
    assert "tokens-00002.arrow" in caplog.text
    assert says in caplog.text
    assert CONVERSATIONS // 2 < making.made < CONVERSATIONS


@pytest.mark.parametrize("place", [5, 200, 700])
def test_a_damaged_manifest_is_told(tmp_path: Path, place: int, caplog: pytest.LogCaptureFixture) -> None:
    _fill(tmp_path, Making())
    _flip(tmp_path / token_store.MANIFEST, place)
    making = Making()
    with caplog.at_level(logging.WARNING, "deepspec"):
        _require_whole(_fill(tmp_path, making))
    assert "are made again" in caplog.text
    assert making.made == CONVERSATIONS


def test_other_facts_and_older_versions_make_it_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _fill(tmp_path, Making())
    changed = {**FACTS, "the tokenizer": "b"}
    assert TokenStore(tmp_path, changed).ready() is None
    making = Making()
    with caplog.at_level(logging.WARNING, "deepspec"):
        _fill(tmp_path, making, changed)
        assert "changed since: the tokenizer" in caplog.text
        monkeypatch.setattr(token_store, "VERSION", token_store.VERSION + 1)
        _require_whole(_fill(tmp_path, making, changed))
    assert f"they are of version {token_store.VERSION - 1}" in caplog.text
    assert making.made == 2 * CONVERSATIONS


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with (
        lock(tmp_path, problem="", fix=""),
        pytest.raises(StageError, match="Another process is storing"),
    ):
        _fill(tmp_path, Making())


def test_a_shard_does_not_count_where_the_check_raises(tmp_path: Path) -> None:
    def changed() -> None:
        raise DataError("A source changed")

    store = TokenStore(tmp_path, FACTS)
    with pytest.raises(DataError, match="A source changed"):
        store.fill(Making(), Counter(), changed)
    assert json.loads((tmp_path / token_store.MANIFEST).read_text())["shards"] == []


def test_a_set_of_digests_is_a_set() -> None:
    ours, plain = DigestSet(), set[bytes]()
    for number in np.random.default_rng(0).integers(0, 4000, 6000).tolist():
        digest = digest16(f"text {number}")
        assert (digest in ours) == (digest in plain)
        assert ours.add(digest) == (digest not in plain)
        plain.add(digest)
    assert len(ours) == len(plain)
    assert 24 * len(ours) <= ours.num_bytes <= 48 * len(ours)
