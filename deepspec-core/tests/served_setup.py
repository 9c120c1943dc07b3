"""Feature servers of a tiny target for tests: samples, stand-ins, and what asks them."""

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from feature_stand_in import FeatureStandIn, states_of
from torch import nn

from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.features.served.asking import FeatureWork, short_sample
from deepspec_core.features.served.exchange import Exchange, Ownership
from deepspec_core.features.served.final_norm import FinalNorm
from deepspec_core.features.served.layers import AskedLayers
from deepspec_core.features.served.source import FeatureServers
from deepspec_core.pipeline.feature_servers import NAMES
from deepspec_core.servers.farm import Farm
from deepspec_core.servers.wanted import Wanted
from deepspec_core.testing.tiny_target import TinyTarget
from deepspec_core.testing.tiny_tokenizer import tiny_tokenizer

TAPS, VOCAB, OWNER = (0, 2), 48, "0123456789abcdef"
LAYERS = AskedLayers(taps=TAPS, num_layers=4)
SAMPLE = (3, 1, 4, 1, 5, 9, 2, 6)


class RootMeanSquare(nn.Module):
    """The tiny target's last norm, which has no gain."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / x.float().square().mean(-1, keepdim=True).sqrt()


@cache
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(tiny_tokenizer())


@cache
def target() -> TinyTarget:
    return TinyTarget(vocab_size=VOCAB)


def samples(count: int = 13) -> list[Sample]:
    rng = random.Random(0)
    found = []
    for index in range(count):
        ids = torch.tensor([rng.randrange(2, VOCAB - 2) for _ in range(rng.randint(6, 30))])
        mask = torch.arange(len(ids)) >= len(ids) // 3
        found.append(Sample(id=f"s{index:03d}", input_ids=ids, loss_mask=mask, original_length=len(ids)))
    return found


def stand_in(folder: Path) -> FeatureStandIn:
    server = FeatureStandIn(states_of(target(), TAPS), LAYERS.ids, folder)
    server.sample = list(SAMPLE)
    return server


def asking(folder: Path, servers: Sequence[FeatureStandIn], **changes: Any) -> FeatureServers:
    """What asks these servers. `changes`: most, file_timeout, timeout, at_once, prefetch, ownership, layers, norm."""
    settings: dict[str, Any] = {"most": 10**8, "file_timeout": 0.1, "timeout": 20.0, "at_once": 4, "prefetch": 8}
    settings |= {"ownership": Ownership(owner=OWNER), "layers": LAYERS, "norm": FinalNorm(RootMeanSquare())}
    settings |= {"pause": 0.005, "stored": None, "references": (), "say_after": 5.0} | changes
    wanted = Wanted(
        names=("tiny",),
        tokenizer=tokenizer(),
        vocab_size=VOCAB,
        sampling=Sampling(),
        stop_ids=(1,),
        end_id=1,
        max_tokens=1,
        max_length=65,
        timeout=settings["timeout"],
        max_concurrency=settings["at_once"],
        called=NAMES,
    )
    exchange = Exchange(
        folder=folder.resolve(),
        ownership=settings["ownership"],
        most=settings["most"],
        late=settings["file_timeout"],
    )
    work = FeatureWork(
        wanted=wanted,
        layers=settings["layers"],
        hidden_size=16,
        exchange=exchange,
        norm=settings["norm"],
        file_timeout=settings["file_timeout"],
        sample=short_sample(SAMPLE, 64),
        stored=settings["stored"],
        references=settings["references"],
        probe_pause=0.001,
    )
    farm = Farm(
        addresses=[server.address for server in servers],
        work=work,
        pause=settings["pause"],
        say_after=settings["say_after"],
    )
    return FeatureServers(farm=farm, prefetch=settings["prefetch"])


def expected(sample: Sample, taps: Sequence[int] = TAPS) -> Sample:
    """The sample with the features that the target computes for it here, alone in its batch."""
    ids = sample.input_ids[None]
    found = target().features(ids, torch.ones_like(ids).bool(), None, None, tuple(taps))
    return evolve(sample, features=evolve(found, hidden=found.hidden[0], last_hidden=found.last_hidden[0]))
