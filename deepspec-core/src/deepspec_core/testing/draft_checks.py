"""Checks that hold for any draft, and checks of how near two results are, for tests of drafts.

This file knows rows, gradients and the contracts of drafts. The caller decides which draft is tested.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from attrs import evolve
from torch import Tensor, nn

from deepspec_core.contracts.draft import DraftBatch, DraftModel
from deepspec_core.contracts.rows import Rows

__all__ = [
    "check_all_near",
    "check_autocast",
    "check_frozen_heads",
    "check_near",
    "check_same_rows",
    "gradients_of",
    "head_products",
    "rows_where",
    "trained",
]

_PER_ROW = ("hidden", "correction", "target_index", "target_ids", "weight", "slot", "block")


def check_near(found: Tensor | None, expected: Tensor, relative: float, name: str = "tensors") -> None:
    """Check that no entry differs by more than `relative` times the largest entry of `expected`."""
    assert found is not None, f"{name}: None"
    limit = relative * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=limit, msg=lambda text: f"{name}: {text}")


def check_all_near(found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor], relative: float) -> None:
    """Check that both have the same names, and that the tensors of each name are near."""
    assert found.keys() == expected.keys(), f"by name: {found.keys() ^ expected.keys()}"
    for name, tensor in expected.items():
        check_near(found[name], tensor, relative, name)


def trained(draft: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: part for name, part in draft.named_parameters() if part.requires_grad}


def gradients_of(total: Tensor, draft: nn.Module) -> dict[str, Tensor]:
    """The gradient of every parameter that `total` depends on."""
    draft.zero_grad()
    total.backward()  # type: ignore[no-untyped-call]
    return {name: part.grad.clone() for name, part in draft.named_parameters() if part.grad is not None}


def head_products(draft: DraftModel, rows: Rows) -> Tensor:
    """The products of rows with the draft's head, [N, D]: logits before the cap and the correction."""
    head = draft.heads().draft
    if head.dim() == 2:
        return rows.hidden @ head.T
    by_slot_NGD = torch.einsum("nh,gdh->ngd", rows.hidden, head)
    return by_slot_NGD[torch.arange(len(rows.slot)), rows.slot]


def rows_where(rows: Rows, keep: Tensor) -> Rows:
    """The rows that `keep` [N] selects."""
    return evolve(rows, **{name: getattr(rows, name)[keep] for name in _PER_ROW if getattr(rows, name) is not None})


def check_same_rows(found: Rows, expected: Rows, relative: float) -> None:
    """Check that hidden states are near and all else is equal. Blocks are numbered from the first of each."""
    check_near(found.hidden, expected.hidden, relative, "hidden")
    assert found.target_hidden is not None
    assert expected.target_hidden is not None
    assert torch.equal(found.target_hidden[found.target_index], expected.target_hidden[expected.target_index])
    assert (found.target_ids is None) == (expected.target_ids is None)
    for name in ("target_ids", "weight", "slot"):
        one, other = getattr(found, name), getattr(expected, name)
        assert one is other is None or torch.equal(one, other), name
    assert torch.equal(found.block - found.block[0], expected.block - expected.block[0]), "block"


def check_frozen_heads(draft: DraftModel) -> None:
    """Check that embedding and lm_head hold the target's weights, as `adopt` copied them, and are not trained.

    Heads that a draft trains itself, one for each slot, begin as the target's.
    """
    assert isinstance(draft, DraftModel)
    assert not any(part.requires_grad for part in (*draft.embed_tokens.parameters(), *draft.lm_head.parameters()))
    weight = draft.lm_head.weight
    draft.adopt(torch.ones_like(weight), torch.full_like(weight, 2.0))
    assert (draft.embed_tokens.weight == 1).all()  # type: ignore[union-attr]
    assert (draft.heads().draft == 2).all()
    heads = draft.heads()
    assert heads.target is (heads.draft if heads.draft.dim() == 2 else draft.lm_head.weight)


def check_autocast(draft: DraftModel, batch: DraftBatch, *, mean: float) -> None:
    """Check that bfloat16 changes hidden states, by `mean` on average at most, and that gradients are finite."""
    exact = draft(batch).hidden
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = draft(batch)
        logits = head_products(draft, rows)
    difference = (rows.hidden - exact).abs()
    assert difference.max() > 0
    assert difference.mean() < mean
    assert all(part.isfinite().all() for part in gradients_of(logits.float().logsumexp(-1).sum(), draft).values())
