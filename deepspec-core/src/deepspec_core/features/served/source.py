"""Features from servers while training: `[features] mode = "server"`, which pipeline/feature_servers.py makes of a run.

Knows samples and streams of them. Does not know servers, files, or what is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from attrs import define, evolve, field
from torch import Tensor

from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.crew import ALONE, Crew
from deepspec_core.data.collate import pad_features
from deepspec_core.features.samples_by_id import SamplesById
from deepspec_core.features.served.stream import Stream, Tally, totals
from deepspec_core.servers.farm import Farm


@define(kw_only=True)
class FeatureServers:
    """A run's feature servers, as one process asks them. `prefetch`: samples that it asks for ahead, at most."""

    farm: Farm
    prefetch: int
    tally: Tally = field(factory=Tally)

    def check(self, *, strict: bool = True) -> None:
        """As Farm.check."""
        self.farm.check(strict=strict)

    def summary(self, crew: Crew) -> Mapping[str, Any]:
        """What all workers got. All of them must call it."""
        return totals(crew.gather("what servers gave", self.tally.summary()))

    def stream(self, samples: Iterable[Sample], *, waiting: Callable[[], None] = lambda: None) -> Stream:
        """The samples with features, in this order. `waiting` is called now and then while one is waited for."""
        return Stream(self.farm, iter(samples), prefetch=self.prefetch, tally=self.tally, waiting=waiting)


class ServedFeatures(SamplesById):
    """Samples ordered by id, the same order as with a cache; features from servers, in the type that they write.

    `in_order` asks for them ahead of training. It works in the training process: no loader worker has the servers.
    """

    def __init__(self, samples: Sequence[Sample], servers: FeatureServers, crew: Crew = ALONE) -> None:
        super().__init__(samples)
        self.servers, self._crew = servers, crew

    def in_order(self, indices: Iterable[int]) -> Stream:
        """The samples of these indices with features, in this order, read ahead. It must be closed."""
        return self.servers.stream(self[index] for index in indices)

    def features(self, samples: Sequence[Sample], input_ids: Tensor, attention_mask: Tensor) -> TargetFeatures:
        """The features of a batch that came without; nothing is read ahead."""
        missing = [evolve(sample, features=None) for sample in samples]
        with self.servers.stream(missing) as stream:
            features = pad_features(list(stream))
        assert features is not None, "a stream gives features"
        return TargetFeatures(
            hidden=features.hidden.to(input_ids.device), last_hidden=features.last_hidden.to(input_ids.device)
        )

    def figures(self) -> Mapping[str, float]:
        """What this process got so far, by the names of metrics.jsonl."""
        tally = self.servers.tally
        return {"served_bytes": tally.bytes, "served_failures": tally.failed}

    def summary(self) -> Mapping[str, Any]:
        """What the stage's summary says of all workers. All of them must call it."""
        return self.servers.summary(self._crew)
