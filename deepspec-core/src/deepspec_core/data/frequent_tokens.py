"""The most frequent tokens of answers, for the vocabulary of a draft with a reduced vocabulary.

Knows ids and masks. Does not know drafts, targets or where samples come from.

Legend: D tokens chosen, V tokens of the target.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from deepspec_core.contracts.draft import Sample


@frozen(kw_only=True, eq=False)
class FrequentTokens:
    """`ids` [D] int64, increasing. `supervised` tokens were counted, of which `covered` are among the ids."""

    ids: Tensor
    supervised: int
    covered: int


def frequent_tokens(samples: Iterable[Sample], *, size: int, vocab_size: int, always: Iterable[int]) -> FrequentTokens:
    """The `size` most frequent supervised tokens, of equals the smaller id; `always` are among them, however rare.

    If there are fewer, tokens that never occur are added in the order of ids.
    """
    count_V = np.zeros(vocab_size, dtype=np.int64)
    for sample in samples:
        supervised = sample.input_ids[sample.loss_mask.bool()].numpy()
        count_V += np.bincount(supervised, minlength=vocab_size)
    rank_V = count_V.copy()
    rank_V[list(always)] = np.iinfo(np.int64).max
    ids = np.sort(np.argsort(-rank_V, kind="stable")[:size])
    return FrequentTokens(ids=torch.from_numpy(ids), supervised=int(count_V.sum()), covered=int(count_V[ids].sum()))
