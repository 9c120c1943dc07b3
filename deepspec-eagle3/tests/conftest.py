"""What the tests of this package share: a tiny draft with new weights, and batches for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deepspec_core.layers.options import LayerOptions
from deepspec_core.testing.random_batches import TAPS, with_large_weights
from deepspec_core.testing.recorded import Recordings
from deepspec_eagle3.model import Eagle3Model
from deepspec_eagle3.options import Eagle3Options


@pytest.fixture
def make_model(recordings: Recordings) -> Callable[..., Eagle3Model]:
    """A draft with new weights."""

    def make(
        seed: int = 0,
        taps: tuple[int, ...] = TAPS,
        family: str = "qwen3",
        window: int | None = None,
        **options: Any,
    ) -> Eagle3Model:
        torch.manual_seed(seed)
        settings = {"ttt_length": 4} | options
        adapter = recordings.adapter(family, draft_layer=LayerOptions(window=window))
        return with_large_weights(Eagle3Model(Eagle3Options(**settings), adapter, taps))

    return make
