"""What the tests of this package share: recorded vectors, tiny adapters of each family, random samples and batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig

from deepspec_core import plugin as core_plugin
from deepspec_core.contracts.draft import DraftBatch, PreparedSample, Sample
from deepspec_core.contracts.target import TargetAdapter, TargetFeatures
from deepspec_core.registry import Offer, Registry
from deepspec_eagle3.model import Eagle3Model
from deepspec_eagle3.options import Eagle3Options
from deepspec_eagle3.plugin import deepspec_draft_models
from deepspec_targets.plugin import deepspec_target_adapters

TAPS = (0, 2, 3, 5, 6)


@pytest.fixture(scope="session")
def parity() -> Path:
    """The folder of recorded vectors."""
    return Path(__file__).parents[2] / "tests" / "parity"


@pytest.fixture(scope="session")
def registry() -> Registry:
    """Holds this package's draft, the target families, and core's terms and weightings."""
    offers = [("draft", spec) for spec in deepspec_draft_models()]
    offers += [("target", spec) for spec in deepspec_target_adapters()]
    offers += [("loss", spec) for spec in core_plugin.deepspec_losses()]
    offers += [("weighting", spec) for spec in core_plugin.deepspec_weightings()]
    return Registry(
        Offer(kind=kind, spec=spec, plugin="tests", package="deepspec-tests", version="0.1.0") for kind, spec in offers
    )


@pytest.fixture(scope="session", params=["qwen3", "gemma4"])
def family(request: pytest.FixtureRequest) -> str:
    """Each family with recorded vectors."""
    return str(request.param)


@pytest.fixture(scope="session")
def adapter_of(parity: Path, registry: Registry) -> Callable[[str], TargetAdapter]:
    """The adapter of a family's recorded target: H 32, V 64, 8 layers."""

    def adapter(family: str) -> TargetAdapter:
        built: TargetAdapter = registry.load("target", family)(AutoConfig.from_pretrained(parity / f"{family}-target"))
        return built

    return adapter


@pytest.fixture
def make_model(adapter_of: Callable[[str], TargetAdapter]) -> Callable[..., Eagle3Model]:
    """A draft with new weights, large enough that outputs differ visibly."""

    def make(seed: int = 0, taps: tuple[int, ...] = TAPS, family: str = "qwen3", **options: Any) -> Eagle3Model:
        torch.manual_seed(seed)
        model = Eagle3Model(Eagle3Options(**({"ttt_length": 4} | options)), adapter_of(family), taps)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=parameter.shape[1] ** -0.5)
        return model

    return make


@pytest.fixture
def make_sample() -> Callable[..., Sample]:
    """A random sample with features; `mask` gives its loss mask, all but the first token by default."""

    def make(name: str, length: int, mask: Sequence[int] | None = None, seed: int = 0, taps: int = 5) -> Sample:
        generator = torch.Generator().manual_seed(seed)
        supervised = torch.ones(length, dtype=torch.bool) if mask is None else torch.tensor(mask, dtype=torch.bool)
        supervised[0] = False
        return Sample(
            id=name,
            input_ids=torch.randint(2, 63, (length,), generator=generator),
            loss_mask=supervised,
            original_length=length,
            features=TargetFeatures(
                hidden=torch.randn(length, 32 * taps, generator=generator),
                last_hidden=torch.randn(length, 32, generator=generator),
            ),
        )

    return make


@pytest.fixture
def make_batch() -> Callable[..., DraftBatch]:
    """Samples, prepared and right-padded by `extra` more positions than needed, which hold `filler`.

    `rows` packs them: each entry lists the samples of one row, which follow each other without a gap.
    """

    def make(
        model: Eagle3Model,
        samples: Sequence[Sample],
        extra: int = 0,
        filler: float = 0.0,
        rows: Sequence[Sequence[int]] | None = None,
    ) -> DraftBatch:
        grouped = [[sample] for sample in samples] if rows is None else [[samples[i] for i in row] for row in rows]
        width = max(sum(len(sample.input_ids) for sample in row) for row in grouped) + extra

        def padded(part: Callable[[Sample], torch.Tensor], value: float) -> torch.Tensor:
            joined = [torch.cat([part(sample) for sample in row]) for row in grouped]
            full = torch.zeros(width, *joined[0].shape[1:], dtype=joined[0].dtype)
            return pad_sequence([*joined, full], batch_first=True, padding_value=value)[:-1]

        order = {id(sample): float(number) for row in grouped for number, sample in enumerate(row)}
        prepared: list[PreparedSample] = [
            model.preparation.prepare(sample, np.random.default_rng(0)) for row in grouped for sample in row
        ]
        return DraftBatch(
            input_ids=padded(lambda sample: sample.input_ids, 0),
            loss_mask=padded(lambda sample: sample.loss_mask, 0),
            attention_mask=padded(lambda sample: torch.ones_like(sample.loss_mask), 0),
            features=TargetFeatures(
                hidden=padded(lambda sample: sample.features.hidden, filler),  # type: ignore[union-attr]
                last_hidden=padded(lambda sample: sample.features.last_hidden, filler),  # type: ignore[union-attr]
            ),
            prepared=model.preparation.collate(prepared),
            position_ids=None if rows is None else padded(lambda sample: torch.arange(len(sample.input_ids)), 0),
            document_ids=None
            if rows is None
            else padded(lambda sample: torch.full((len(sample.input_ids),), int(order[id(sample)])), 0),
        )

    return make
