"""What the tests of this package share: recorded vectors of every installed family, random samples and batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from deepspec_core.contracts.draft import DraftBatch, PreparedSample, Sample
from deepspec_core.contracts.target import TargetAdapter, TargetFeatures
from deepspec_core.features.targets import open_adapter
from deepspec_core.plugin import deepspec_losses, deepspec_weightings
from deepspec_core.registry import Offer, Registry
from deepspec_dflash import plugin as dflash
from deepspec_dspark import plugin as dspark
from deepspec_dspark.model import DSparkModel
from deepspec_dspark.options import DSparkOptions, MarkovOptions
from deepspec_targets.plugin import deepspec_target_adapters

TAPS = (0, 2, 3, 5, 6)
FAMILIES = ("qwen3", "gemma4")


@pytest.fixture(scope="session")
def parity() -> Path:
    """The folder of recorded vectors."""
    return Path(__file__).parents[2] / "tests" / "parity"


@pytest.fixture(scope="session")
def registry() -> Registry:
    """Both drafts that share a class name, core's terms and weightings, and the families."""
    offers = [("draft", spec) for plugin in (dflash, dspark) for spec in plugin.deepspec_draft_models()]
    offers += [("loss", spec) for spec in deepspec_losses()]
    offers += [("weighting", spec) for spec in deepspec_weightings()]
    offers += [("target", spec) for spec in deepspec_target_adapters()]
    return Registry(
        Offer(kind=kind, spec=spec, plugin="p", package="deepspec-p", version="0.1.0") for kind, spec in offers
    )


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, registry: Registry) -> str:
    """Each family with recorded vectors, where it is installed."""
    if request.param not in registry.model_types():
        pytest.fail(f"no adapter for {request.param} is installed")
    return str(request.param)


@pytest.fixture
def adapter(family: str, parity: Path, registry: Registry) -> TargetAdapter:
    """Of the recorded target: H 32, V 64, 8 layers."""
    return open_adapter(parity / f"{family}-target", registry=registry)


@pytest.fixture
def make_model(parity: Path, registry: Registry) -> Callable[..., DSparkModel]:
    """A draft with new weights, large enough that outputs differ visibly."""
    of_qwen3 = open_adapter(parity / "qwen3-target", registry=registry)

    def make(*, rank: int = 6, head: str = "vanilla", seed: int = 0, **options: Any) -> DSparkModel:
        torch.manual_seed(seed)
        settings = {"block_size": 4, "num_layers": 2, "num_anchors": 8, "mask_token_id": 63} | options
        model = DSparkModel(DSparkOptions(markov=MarkovOptions(rank=rank, head=head), **settings), of_qwen3, TAPS)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=1.0 if "markov" in name else parameter.shape[1] ** -0.5)
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

    def make(model: DSparkModel, prepared: Sequence[PreparedSample], extra: int = 0, filler: float = 0.0) -> DraftBatch:
        samples = [one.sample for one in prepared]
        width = max(len(sample.input_ids) for sample in samples) + extra

        def padded(parts: Sequence[Tensor], value: float) -> Tensor:
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


@pytest.fixture
def recorded_batch() -> Callable[[DSparkModel, Path], tuple[DraftBatch, list[PreparedSample]]]:
    """The inputs of a recorded case, with the anchors that were drawn there."""

    def read(model: DSparkModel, folder: Path) -> tuple[DraftBatch, list[PreparedSample]]:
        inputs = load_file(folder / "inputs.safetensors")
        prepared = []
        for index, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
            sample = Sample(
                id=str(index),
                input_ids=inputs["input_ids"][index, :length],
                loss_mask=inputs["loss_mask"][index, :length].bool(),
                original_length=length,
            )
            anchors = inputs["anchor_positions"][index][inputs["block_keep_mask"][index]]
            prepared.append(model.preparation.at(sample, anchors))
        batch = DraftBatch(
            input_ids=inputs["input_ids"],
            loss_mask=inputs["loss_mask"].bool(),
            attention_mask=inputs["attention_mask"].bool(),
            features=TargetFeatures(
                hidden=inputs["target_hidden_states"], last_hidden=inputs["target_last_hidden_states"]
            ),
            prepared=model.preparation.collate(prepared),
        )
        return batch, prepared

    return read
