"""What the tests of this package share: recorded vectors, a tiny adapter, random samples and batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig

from deepspec_core.contracts.draft import DraftBatch, PreparedSample, Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.registry import Offer, Registry
from deepspec_dflash.model import DFlashModel
from deepspec_dflash.options import DFlashOptions
from deepspec_dflash.plugin import deepspec_draft_models
from deepspec_targets.qwen3 import Qwen3Adapter

TAPS = (0, 2, 3, 5, 6)


@pytest.fixture(scope="session")
def parity() -> Path:
    """The folder of recorded vectors."""
    return Path(__file__).parents[2] / "tests" / "parity"


@pytest.fixture(scope="session")
def registry() -> Registry:
    """Holds this package's draft only."""
    return Registry(
        Offer(kind="draft", spec=spec, plugin="dflash", package="deepspec-dflash", version="0.1.0")
        for spec in deepspec_draft_models()
    )


@pytest.fixture(scope="session")
def adapter(parity: Path) -> Qwen3Adapter:
    """Of the recorded target: H 32, V 64, 8 layers."""
    return Qwen3Adapter(AutoConfig.from_pretrained(parity / "qwen3-target"))


@pytest.fixture
def make_model(adapter: Qwen3Adapter) -> Callable[..., DFlashModel]:
    """A draft with new weights, large enough that outputs differ visibly."""

    def make(seed: int = 0, **options: int) -> DFlashModel:
        torch.manual_seed(seed)
        settings = {"block_size": 4, "num_layers": 2, "num_anchors": 8, "mask_token_id": 63} | options
        model = DFlashModel(DFlashOptions(**settings), adapter, TAPS)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=parameter.shape[1] ** -0.5)
        return model

    return make


@pytest.fixture
def make_sample() -> Callable[..., Sample]:
    """A random sample with features; `mask` gives its loss mask, all but the first token by default."""

    def make(name: str, length: int, mask: Sequence[int] | None = None, seed: int = 0) -> Sample:
        generator = torch.Generator().manual_seed(seed)
        supervised = torch.ones(length, dtype=torch.bool) if mask is None else torch.tensor(mask, dtype=torch.bool)
        supervised[0] = False
        return Sample(
            id=name,
            input_ids=torch.randint(2, 63, (length,), generator=generator),
            loss_mask=supervised,
            original_length=length,
            features=TargetFeatures(
                hidden=torch.randn(length, 32 * len(TAPS), generator=generator),
                last_hidden=torch.randn(length, 32, generator=generator),
            ),
        )

    return make


@pytest.fixture
def make_batch() -> Callable[..., DraftBatch]:
    """Prepared samples, right-padded by `extra` more positions than needed, which hold `filler`."""

    def make(model: DFlashModel, prepared: Sequence[PreparedSample], extra: int = 0, filler: float = 0.0) -> DraftBatch:
        samples = [one.sample for one in prepared]
        width = max(len(sample.input_ids) for sample in samples) + extra

        def padded(parts: Sequence[torch.Tensor], value: float) -> torch.Tensor:
            full = torch.zeros(width, *parts[0].shape[1:], dtype=parts[0].dtype)
            return pad_sequence([*parts, full], batch_first=True, padding_value=value)[:-1]

        features = [sample.features for sample in samples]
        return DraftBatch(
            input_ids=padded([sample.input_ids for sample in samples], 0),
            loss_mask=padded([sample.loss_mask for sample in samples], 0),
            attention_mask=padded([torch.ones_like(sample.loss_mask) for sample in samples], 0),
            features=TargetFeatures(
                hidden=padded([part.hidden for part in features if part], filler),
                last_hidden=padded([part.last_hidden for part in features if part], filler),
            ),
            prepared=model.preparation.collate(prepared),
        )

    return make
