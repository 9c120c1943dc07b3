"""The memory of a pass over rows while it runs, the memory kept until backward, and its operations.

The figures are computed from shapes, following the steps of chunk_pass.py. Nothing runs. Knows shapes only.
"""

from __future__ import annotations

import torch
from attrs import frozen

from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.rows.chunk_pass import keeps_apart
from deepspec_core.rows.kernels.choice import Choice
from deepspec_core.rows.kernels.formulas import SLAB

# How many fp32 tensors of a chunk's or a slab's size exist at once where operations are not fused.
_ALIVE = 8


@frozen(kw_only=True)
class Footprint:
    """What a pass takes.

    workspace_bytes: The buffers that chunks share. They are freed after the pass.
    gradient_bytes: The gradients that are kept until backward.
    flops: Operations of the products with the vocabulary, forward and backward; a multiplication counts as 2.
    """

    workspace_bytes: int
    gradient_bytes: int
    flops: int


def footprint(
    choice: Choice,
    rows: Rows,
    heads: Heads,
    *,
    chunk_rows: int | None,
    compares: bool,
    uncorrected: bool,
    dtype: torch.dtype,
) -> Footprint:
    """The footprint of a pass over such rows (see RowPass).

    Their tensors may be fake. `dtype` is that of the products.
    """
    num_rows, (vocab_size, hidden_size) = len(rows.hidden), heads.draft.shape[-2:]
    positions = 0 if rows.target_hidden is None else len(rows.target_hidden)
    rank = 0 if rows.correction is None else rows.correction.shape[1]
    chunks = max(1, -(-num_rows // (chunk_rows or choice.chunk_rows)))
    chunk = -(-num_rows // chunks)
    # Steps that are logged read the target's logits even if no term does.
    window = min(positions, chunk)
    buffers = chunk * (2 if keeps_apart(rows, heads, uncorrected=uncorrected) else 1) + window
    statistics = torch.promote_types(dtype, torch.float32).itemsize
    if choice.name == "plain":
        temporary = _ALIVE * chunk * vocab_size * statistics
    else:
        temporary = _ALIVE * min(SLAB, chunk * vocab_size) * statistics if choice.name == "eager" else 0
    # Of a reduced vocabulary, figures of the whole one are formed too, in products of a chunk's size.
    whole = 0
    if heads.draft_ids is not None and compares:
        whole_rows = max(1, choice.chunk_rows * vocab_size // len(heads.target))
        whole = min(positions, chunk, whole_rows) * len(heads.target) * dtype.itemsize
    head = heads.draft.numel() if heads.draft.requires_grad else 0
    head += 0 if heads.correction is None else heads.correction.numel()
    widths, trained = hidden_size + rank, rank + (hidden_size if heads.draft.requires_grad else 0)
    products = 2 * widths * num_rows + (positions * hidden_size if compares else 0) + num_rows * trained
    return Footprint(
        workspace_bytes=buffers * vocab_size * dtype.itemsize + temporary + whole,
        gradient_bytes=num_rows * widths * dtype.itemsize + head * (dtype.itemsize if chunks == 1 else statistics),
        flops=2 * vocab_size * products + (2 * positions * heads.target.numel() if whole else 0),
    )
