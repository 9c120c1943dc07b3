"""Padding."""

import torch

from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.data.collate import pad_features, pad_ids


def _sample(length: int, *, features: bool) -> Sample:
    ids = torch.arange(1, length + 1)
    stored = TargetFeatures(
        hidden=torch.full((length, 6), float(length), dtype=torch.bfloat16),
        last_hidden=torch.full((length, 2), -float(length), dtype=torch.bfloat16),
    )
    return Sample(
        id=str(length),
        input_ids=ids,
        loss_mask=ids > 1,
        original_length=length,
        features=stored if features else None,
    )


def test_padding_is_on_the_right_and_masked() -> None:
    ids, mask = pad_ids([_sample(2, features=False), _sample(4, features=False)])
    assert ids.tolist() == [[1, 2, 0, 0], [1, 2, 3, 4]]
    assert mask.tolist() == [[True, True, False, False], [True] * 4]
    assert ids.dtype == torch.long


def test_features_keep_their_dtype_and_are_zero_past_the_end() -> None:
    features = pad_features([_sample(2, features=True), _sample(3, features=True)])
    assert features is not None
    assert features.hidden.shape == (2, 3, 6)
    assert features.hidden.dtype == torch.bfloat16
    assert features.last_hidden[0].tolist() == [[-2.0, -2.0], [-2.0, -2.0], [0.0, 0.0]]
    assert pad_features([_sample(2, features=False)]) is None
