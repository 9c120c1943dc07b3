"""Features that came with answers: found by token ids, kept through kills, and never those of something else."""

from pathlib import Path

import pytest
import torch
from attrs import evolve
from served_setup import TAPS, VOCAB, expected, samples

from deepspec_core.cache.hdf5 import HDF5Format
from deepspec_core.contracts.cache import CacheHeader
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.errors import CacheError
from deepspec_core.features import kept
from deepspec_core.features.kept import JOURNAL, LOST, STORE, UNKNOWN, KeptFeatures, KeptWriter

HEADER = CacheHeader(
    target="tiny",
    revision="1",
    adapter="tiny",
    taps=TAPS,
    hidden_size=16,
    vocab_size=VOCAB,
    dtype="float32",
    tokenizer="",
    template="",
    max_length=64,
    source="",
    plugins={},
)


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[Sample]:
    """Five, with features; two of them make a shard."""
    monkeypatch.setattr(kept, "SHARD_SAMPLES", 2)
    return [expected(sample) for sample in samples(5)]


def keep(writer: KeptWriter, sample: Sample) -> None:
    assert sample.features is not None
    writer.keep(sample.input_ids, sample.features)


def read(folder: Path) -> KeptFeatures:
    return KeptFeatures(HDF5Format(), folder, HEADER)


def check(found: KeptFeatures, sample: Sample) -> None:
    other = found.of(evolve(sample, id="another id", features=None))
    assert other.id == "another id"
    assert other.features is not None
    assert sample.features is not None
    torch.testing.assert_close(other.features.hidden, sample.features.hidden, rtol=0, atol=0)
    torch.testing.assert_close(other.features.last_hidden, sample.features.last_hidden, rtol=0, atol=0)
    assert torch.equal(other.loss_mask, sample.loss_mask), "the sample's own, which an answer does not know"


def test_features_are_found_by_token_ids(texts: list[Sample], tmp_path: Path) -> None:
    with KeptWriter(HDF5Format(), tmp_path, HEADER) as writer:
        for sample in (*texts[:3], texts[0]):  # the same text twice
            keep(writer, sample)
        writer.lacks(texts[3].input_ids, "it rained")
    found = read(tmp_path)
    assert len(found) == 3
    for sample in texts[:3]:
        assert found.has(sample)
        check(found, sample)
    assert [found.why_not(sample) for sample in texts[3:]] == ["it rained", UNKNOWN]
    cut = evolve(texts[0], input_ids=texts[0].input_ids[:-1])
    assert not found.has(cut)
    assert found.why_not(cut) == UNKNOWN


def test_a_kill_loses_one_shard_and_says_so(texts: list[Sample], tmp_path: Path) -> None:
    writer = KeptWriter(HDF5Format(), tmp_path, HEADER)
    for sample in texts[:3]:
        keep(writer, sample)
    writer._writer.close()  # of the last shard nothing is left
    with (tmp_path / JOURNAL).open("ab") as journal:
        journal.write(b'["torn')
    with pytest.raises(CacheError, match="unfinished"):
        read(tmp_path)
    with KeptWriter(HDF5Format(), tmp_path, HEADER) as writer:
        keep(writer, texts[1])  # answered again, since its line was lost
        keep(writer, texts[3])
        assert writer.told() == {"": 3, LOST: 1}
    found = read(tmp_path)
    assert [found.has(sample) for sample in texts] == [True, True, False, True, False]
    assert [found.why_not(sample) for sample in (texts[2], texts[4])] == [LOST, UNKNOWN]
    check(found, texts[1])
    check(found, texts[3])


def test_a_run_that_ends_early_loses_nothing(texts: list[Sample], tmp_path: Path) -> None:
    def interrupted() -> None:
        with KeptWriter(HDF5Format(), tmp_path, HEADER) as writer:
            keep(writer, texts[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with KeptWriter(HDF5Format(), tmp_path, HEADER) as writer:
        keep(writer, texts[1])
    for sample in texts[:2]:
        check(read(tmp_path), sample)


def test_nothing_may_be_kept_at_all(texts: list[Sample], tmp_path: Path) -> None:
    with KeptWriter(HDF5Format(), tmp_path, HEADER) as writer:
        writer.lacks(texts[0].input_ids, "no")
    assert len(read(tmp_path)) == 0


def test_other_settings_and_lost_files_are_refused(texts: list[Sample], tmp_path: Path) -> None:
    with KeptWriter(HDF5Format(), tmp_path, HEADER) as writer:
        for sample in texts:
            keep(writer, sample)
    for change in ({"revision": "2"}, {"taps": (0, 1)}, {"dtype": "bfloat16"}):
        with pytest.raises(CacheError, match=f"another {next(iter(change))}"):
            KeptFeatures(HDF5Format(), tmp_path, evolve(HEADER, **change))
    found = read(tmp_path)
    next((tmp_path / STORE).glob("shard-00000*")).write_bytes(b"other")
    with pytest.raises(CacheError, match="cannot be read") as caught:
        found.of(texts[0])
    assert "the missing features are then requested" in str(caught.value)
    with pytest.raises(CacheError):
        read(tmp_path)


def test_eight_bits_are_the_same_when_they_are_stored_again(texts: list[Sample], tmp_path: Path) -> None:
    """The cache stage reads what was kept and writes it once more. Scales may be halved, where bits are doubled."""
    header = evolve(HEADER, dtype="float8_e4m3")
    given = [evolve(texts[0], features=_scaled(texts[0], size)) for size in (1.0, 0.013, 700.0)]
    for number, sample in enumerate(given):
        once, twice = tmp_path / f"once-{number}", tmp_path / f"twice-{number}"
        with KeptWriter(HDF5Format(), once, header) as writer:
            keep(writer, sample)
        read_once = KeptFeatures(HDF5Format(), once, header).of(sample)
        with KeptWriter(HDF5Format(), twice, header) as writer:
            keep(writer, read_once)
        check(KeptFeatures(HDF5Format(), twice, header), read_once)


def _scaled(sample: Sample, size: float) -> TargetFeatures:
    assert sample.features is not None
    return TargetFeatures(hidden=sample.features.hidden * size, last_hidden=sample.features.last_hidden * size)
