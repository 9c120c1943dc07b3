"""What the tests of this package share: a tiny draft with new weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from deepspec_core.layers.options import LayerOptions
from deepspec_core.testing.random_batches import TAPS, with_large_weights
from deepspec_core.testing.recorded import Recordings
from deepspec_dflash.model import DFlashModel
from deepspec_dflash.options import DFlashOptions


@pytest.fixture
def make_model(recordings: Recordings) -> Callable[..., DFlashModel]:
    """A draft with new weights."""

    def make(seed: int = 0, window: int | None = None, **options: int) -> DFlashModel:
        torch.manual_seed(seed)
        settings = {"block_size": 4, "num_layers": 2, "num_anchors": 8, "mask_token_id": 63} | options
        adapter = recordings.adapter("qwen3", draft_layer=LayerOptions(window=window))
        return with_large_weights(DFlashModel(DFlashOptions(**settings), adapter, TAPS))

    return make


@pytest.fixture
def model(make_model: Callable[..., DFlashModel]) -> DFlashModel:
    """One of the usual shape."""
    return make_model()
