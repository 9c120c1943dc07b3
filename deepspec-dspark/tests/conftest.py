"""What the tests of this package share: a tiny draft with new weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deepspec_core.testing.random_batches import TAPS, with_large_weights
from deepspec_core.testing.recorded import Recordings
from deepspec_dspark.model import DSparkModel
from deepspec_dspark.options import DSparkOptions, MarkovOptions


@pytest.fixture
def make_model(recordings: Recordings) -> Callable[..., DSparkModel]:
    """A draft with new weights, those of its Markov head as large as its logits."""
    adapter = recordings.adapter("qwen3")

    def make(*, rank: int = 6, head: str = "vanilla", seed: int = 0, **options: Any) -> DSparkModel:
        torch.manual_seed(seed)
        settings = {"block_size": 4, "num_layers": 2, "num_anchors": 8, "mask_token_id": 63} | options
        model = DSparkModel(DSparkOptions(markov=MarkovOptions(rank=rank, head=head), **settings), adapter, TAPS)
        with_large_weights(model)
        if model.markov_head is not None:
            with torch.no_grad():
                for parameter in model.markov_head.parameters():
                    if parameter.dim() == 2:
                        parameter.normal_()
        return model

    return make
