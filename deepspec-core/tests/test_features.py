"""Features, captured, cached and online, are the same numbers for the same samples in the same order."""

import pickle
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from deepspec_core.cache.hdf5 import HDF5Format
from deepspec_core.contracts.cache import CacheHeader
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.features import FeatureSource
from deepspec_core.contracts.target import TargetFeatures, TargetModel
from deepspec_core.data.collate import pad_ids
from deepspec_core.errors import CacheError
from deepspec_core.features import cached, online
from deepspec_core.features.capture import capture
from deepspec_core.testing.tiny_target import TinyTarget

TAPS = (0, 2)


def _samples(count: int = 13) -> list[Sample]:
    rng = random.Random(0)
    samples = []
    for index in range(count):
        ids = torch.tensor([rng.randrange(2, 60) for _ in range(rng.randint(3, 20))])
        samples.append(Sample(id=f"s{index * 7 % count}", input_ids=ids, loss_mask=ids > 9, original_length=len(ids)))
    return samples


def _cache(path: Path, samples: list[Sample], target: TinyTarget):
    header = CacheHeader(
        target="tiny",
        revision="1",
        adapter="tiny",
        taps=TAPS,
        hidden_size=16,
        vocab_size=64,
        dtype="float32",
        tokenizer="t",
        template="t",
        max_length=64,
        source="s",
        plugins={},
    )
    writer = HDF5Format().create(path, header, shard_samples=4)
    for sample in capture(samples, target, TAPS, batch_size=3):
        writer.write(sample)
    writer.finish()
    return HDF5Format().open(path, header)


def test_the_tiny_target_decodes_what_it_computes_at_once() -> None:
    target = TinyTarget()
    assert isinstance(target, TargetModel)
    ids, mask = pad_ids(_samples(4))
    whole = target.features(ids, mask, None, None, TAPS)
    logits = whole.last_hidden @ target.head_weight().T
    target.open_slots(4, 32)
    slots, lengths = torch.arange(4), mask.sum(1)
    first = torch.full((4,), 2)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    step = target.decode(slots, ids[:, :2], positions[:, :2], TAPS, last_only=True)
    torch.testing.assert_close(step.logits[:, 0], logits[:, 1])
    target.commit(slots, first)
    rest = positions[:, 2:].where(mask[:, 2:], -1)
    step = target.decode(slots, ids[:, 2:], rest, TAPS)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(step.logits[row, : length - 2], logits[row, 2:length])
        torch.testing.assert_close(step.hidden[row, : length - 2], whole.hidden[row, 2:length])
    with pytest.raises(AssertionError):
        target.decode(slots, ids[:, :1], positions[:, :1], TAPS)


def test_capture_equals_the_target_alone() -> None:
    target = TinyTarget()
    captured = {sample.id: sample for sample in capture(_samples(), target, TAPS, batch_size=4)}
    assert len(captured) == 13
    for sample in _samples():
        alone = target.features(sample.input_ids[None], torch.ones(1, len(sample.input_ids)), None, None, TAPS)
        features = captured[sample.id].features
        assert features is not None
        # A batch's products round in another order than those of a sample alone.
        torch.testing.assert_close(features.hidden, alone.hidden[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(features.last_hidden, alone.last_hidden[0], rtol=1e-4, atol=1e-4)
        assert features.hidden.untyped_storage().nbytes() == features.hidden.numel() * 4


def test_an_interrupted_capture_repeats_nothing_and_keeps_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    target = TinyTarget()
    batches: list[list[list[int]]] = []
    features = target.features

    def seen(ids: Tensor, *rest: Any) -> TargetFeatures:
        batches.append(ids.tolist())
        return features(ids, *rest)

    monkeypatch.setattr(target, "features", seen)
    whole = {sample.id: sample for sample in capture(_samples(), target, TAPS, batch_size=4)}
    done = set(list(whole)[:6])
    rest = {sample.id: sample for sample in capture(_samples(), target, TAPS, batch_size=4, done=done)}
    assert rest.keys() == whole.keys() - done
    # The same neighbours, so the same sums; the memory they are formed in is new.
    assert batches[-3:] == batches[1:4]
    for name, sample in rest.items():
        torch.testing.assert_close(sample.features.hidden, whole[name].features.hidden, rtol=1e-6, atol=1e-6)
    half = next(capture(_samples(), target, TAPS, batch_size=4, dtype=torch.bfloat16))
    assert half.features.last_hidden.dtype == torch.bfloat16


def test_cached_and_online_sources_agree(tmp_path: Path) -> None:
    samples, target = _samples(), TinyTarget()
    reader = _cache(tmp_path, samples, target)
    run = SimpleNamespace(
        data=SimpleNamespace(training_samples=lambda: samples, count_mask_token=lambda reader: None),
        cache=SimpleNamespace(open=lambda: reader),
        target=SimpleNamespace(model=target),
        file=SimpleNamespace(target=SimpleNamespace(layers=TAPS), train=SimpleNamespace(batching="packed")),
    )
    stored, live = cached.from_run(run), online.from_run(run)
    assert isinstance(stored, FeatureSource)
    assert isinstance(live, FeatureSource)
    assert list(stored.lengths()) == list(live.lengths()) == [len(live[index].input_ids) for index in range(13)]
    assert [stored[index].id for index in range(13)] == [live[index].id for index in range(13)]
    assert live[0].features is None
    picked = [3, 0, 7]
    ids, mask = pad_ids([live[index] for index in picked])
    computed = live.features([live[index] for index in picked], ids, mask)
    for given in ([stored[index] for index in picked], [live[index] for index in picked]):
        read = stored.features(given, ids, mask)
        torch.testing.assert_close(read.hidden, computed.hidden)
        torch.testing.assert_close(read.last_hidden, computed.last_hidden)
    assert not computed.hidden[~mask].any()


def test_loader_workers_get_samples_without_the_target() -> None:
    source = online.OnlineFeatures(_samples(), TinyTarget(max_positions=5000), TAPS)
    pickled = pickle.dumps(source)
    assert len(pickled) < 50_000
    assert pickle.loads(pickled)[2].id == source[2].id


@pytest.mark.parametrize(
    ("value", "dtype", "says"),
    [
        (70_000.0, torch.float16, ("does not fit float16", "layer 2", "70,000", 'cache.dtype = "bfloat16"')),
        (float("nan"), torch.float32, ("not finite", "layer 2", "target.dtype")),
    ],
)
def test_a_feature_that_cannot_be_kept_is_refused(
    monkeypatch: pytest.MonkeyPatch, value: float, dtype: torch.dtype, says: tuple[str, ...]
) -> None:
    target = TinyTarget()
    true_features = target.features

    def features(*arguments: Any) -> TargetFeatures:
        found = true_features(*arguments)
        # The second tap has the second half of the channels. Padding may hold anything.
        found.hidden[0, 1, 20] = value
        found.hidden[2, -1] = torch.inf
        return found

    monkeypatch.setattr(target, "features", features)
    samples = _samples(3)
    longest = max(samples, key=lambda sample: len(sample.input_ids))
    with pytest.raises(CacheError) as caught:
        list(capture(samples, target, TAPS, batch_size=3, dtype=dtype))
    for part in (*says, longest.id, "token 1"):
        assert part in str(caught.value)
