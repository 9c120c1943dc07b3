"""Interprets rows: the text position each is compared with, the distribution each gives, and a loss over them.

This file knows rows and heads. It does not know which draft made them.

Legend: N rows, V the target's vocabulary, D the draft's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import evolve
from torch import Tensor
from torch.nn.functional import cross_entropy

from deepspec_core.contracts.draft import DraftModel, Sample
from deepspec_core.contracts.rows import Rows
from deepspec_core.layers.softcap import softcapped
from deepspec_core.testing.conformance import require
from deepspec_core.testing.draft_checks import check_near, head_products
from deepspec_core.testing.random_batches import features_of

_PER_ROW = ("hidden", "correction", "target_index", "target_ids", "weight", "slot", "block")


def placed(rows: Rows, samples: Sequence[Sample]) -> list[tuple[int, int]]:
    """The (sample, position) whose last hidden state each row is compared with.

    Rows without target positions are placed by their labels: a block is placed where its labels are the tokens of a
    text, if possible supervised tokens. Raises AssertionError if a row is compared with none of the samples' states, or
    if a block's labels occur in no text.
    """
    if rows.target_hidden is None or rows.target_index is None:
        return _by_labels(rows, samples)
    known = {
        tuple(state.tolist()): (number, at)
        for number, sample in enumerate(samples)
        for at, state in enumerate(features_of(sample).last_hidden)
    }
    found = [known.get(tuple(state.tolist())) for state in rows.target_hidden[rows.target_index]]
    unknown = [row for row, place in enumerate(found) if place is None]
    assert not unknown, f"row {unknown[0]} is compared with what is no last hidden state of the target"
    return [place for place in found if place is not None]


def _by_labels(rows: Rows, samples: Sequence[Sample]) -> list[tuple[int, int]]:
    assert rows.target_ids is not None, "rows without labels and without target positions"
    found: list[tuple[int, int]] = []
    starts, ends = ranges_of(rows.block)
    for first, last in zip(starts, ends, strict=True):
        slots, labels = rows.slot[first:last].tolist(), rows.target_ids[first:last].tolist()
        counted = [place for place, weight in enumerate(rows.weight[first:last].tolist()) if weight > 0]
        fitting = [
            (not all(sample.loss_mask[at + 1 + slots[place]] for place in counted), number, at)
            for number, sample in enumerate(samples)
            for at in range(-slots[0], len(sample.input_ids) - 1)
            if all(
                at + 1 + slots[place] < len(sample.input_ids)
                and int(sample.input_ids[at + 1 + slots[place]]) == labels[place]
                for place in counted
            )
        ]
        assert fitting, f"rows {first} to {last - 1} have the labels {labels}, which follow each other in no text"
        _, number, at = min(fitting)
        found += [(number, at + slot) for slot in slots]
    return found


def ranges_of(block_N: Tensor) -> tuple[list[int], list[int]]:
    """The first row of each block, and the row after its last."""
    counts = torch.unique_consecutive(block_N, return_counts=True)[1]
    ends = counts.cumsum(0).tolist()
    return [0, *ends[:-1]] if ends else [], ends


def logits_of(draft: DraftModel, rows: Rows) -> Tensor:
    """[N, D], capped and corrected, as the engine of losses forms them."""
    heads = draft.heads()
    logits_ND = softcapped(head_products(draft, rows).float(), heads.softcap)
    if rows.correction is None or heads.correction is None:
        return logits_ND
    correction_DR = heads.correction
    if correction_DR.dim() == 3:
        return logits_ND + torch.einsum("nr,ndr->nd", rows.correction.float(), correction_DR[rows.slot])
    return logits_ND + rows.correction.float() @ correction_DR.T


def distributions(draft: DraftModel, rows: Rows) -> Tensor:
    """The draft's distributions over the target's vocabulary, [N, V]."""
    q_ND, ids_D = logits_of(draft, rows).detach().softmax(-1), draft.heads().draft_ids
    if ids_D is None:
        return q_ND
    return q_ND.new_zeros(len(q_ND), len(draft.heads().target)).index_copy_(1, ids_D, q_ND)


def loss_of(draft: DraftModel, rows: Rows) -> Tensor:
    """A loss summed over rows that depends on every head: cross-entropy at the label, and the squares of extras."""
    logits_ND = logits_of(draft, rows)
    if rows.target_ids is None or draft.heads().draft_ids is not None:
        total = (rows.weight * (logits_ND.logsumexp(-1) - logits_ND[:, 0])).sum()
    else:
        total = (rows.weight * cross_entropy(logits_ND, rows.target_ids, reduction="none")).sum()
    for extra in rows.extras.values():
        if extra.is_floating_point():
            total = total + (extra.float() - 1.0).square().sum()
    return total


def without_blocks(rows: Rows, start: int, end: int) -> Rows:
    """The rows from `start` to `end`. The blocks outside are left out."""
    parts = {name: getattr(rows, name) for name in _PER_ROW}
    extras = {name: extra[start:end] for name, extra in rows.extras.items()}
    return evolve(rows, extras=extras, **{name: part[start:end] for name, part in parts.items() if part is not None})


def same_rows(found: Rows, expected: Rows, words: str, near: float) -> None:
    """Raise Unmet, in `words`, if rows differ. Hidden states may differ by `near`, relative to the largest."""
    require(len(found.hidden) == len(expected.hidden), f"{words}: {len(found.hidden)} rows, not {len(expected.hidden)}")
    check_near(found.hidden, expected.hidden, near, f"{words}: hidden")
    for name in ("target_ids", "weight", "slot"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        require((mine is None) == (theirs is None), f"{words}: `{name}` in one of them only")
        same = mine is None or torch.allclose(mine.double(), theirs.double(), rtol=1e-6, atol=0)
        require(same, f"{words}: another `{name}`")
    require((found.correction is None) == (expected.correction is None), f"{words}: `correction` in one of them only")
    if found.correction is not None and expected.correction is not None:
        check_near(found.correction, expected.correction, near, f"{words}: correction")
    require(found.extras.keys() == expected.extras.keys(), f"{words}: other extras")
    for name, extra in expected.extras.items():
        check_near(found.extras[name].double(), extra.double(), 10 * near, f"{words}: extras[{name!r}]")
    if expected.target_hidden is not None and expected.target_index is not None:
        require(found.target_hidden is not None and found.target_index is not None, f"{words}: no target positions")
        mine, theirs = found.target_hidden[found.target_index], expected.target_hidden[expected.target_index]  # type: ignore[index]
        require(torch.equal(mine, theirs), f"{words}: compared with another position of the target")
    if len(found.block):
        same = torch.equal(_numbered(found.block), _numbered(expected.block))
        require(same, f"{words}: rows in other blocks")


def _numbered(block_N: Tensor) -> Tensor:
    """The blocks renumbered from 0 in their order."""
    numbered_N: Tensor = torch.unique_consecutive(block_N, return_inverse=True)[1]
    return numbered_N
