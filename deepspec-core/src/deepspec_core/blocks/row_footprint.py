"""What a pass over rows takes: memory while it runs, memory it leaves for backward, and operations.

Mirrors row_pass.py by arithmetic, so that nothing needs to run. Knows sizes only.
"""

from __future__ import annotations

import torch
from attrs import frozen

from deepspec_core.blocks.kernel_choice import Choice
from deepspec_core.blocks.row_kernels import SLAB

# Tensors of a chunk's or a slab's size, in fp32, that are alive at once where operations are not fused.
_ALIVE = 8


@frozen(kw_only=True)
class Footprint:
    """`workspace_bytes`: of the buffers chunks share, gone after the pass. `gradient_bytes`: kept until backward.

    `flops`: of the vocabulary products, 2 a multiplication, each once forward and once backward.
    """

    workspace_bytes: int
    gradient_bytes: int
    flops: int


def footprint(
    choice: Choice,
    *,
    chunk_rows: int | None,
    compares: bool,
    rows: int,
    positions: int,
    hidden_size: int,
    vocab_size: int,
    correction_rank: int,
    dtype: torch.dtype,
    trains_head: bool,
) -> Footprint:
    """Of `rows` rows that look at `positions` target positions; `correction_rank` 0: none; `dtype`: of products."""
    chunks = max(1, -(-rows // (chunk_rows or choice.chunk_rows)))
    chunk = -(-rows // chunks)
    # Logged steps look at the target's logits whatever the terms need.
    window = min(positions, chunk)
    buffers = chunk * (2 if correction_rank else 1) + window
    statistics = max(4, dtype.itemsize)
    if choice.name == "plain":
        temporary = _ALIVE * chunk * vocab_size * statistics
    else:
        temporary = _ALIVE * min(SLAB, chunk * vocab_size) * statistics if choice.name == "eager" else 0
    heads = vocab_size * (correction_rank + (hidden_size if trains_head else 0))
    widths = hidden_size + correction_rank
    products = 2 * widths * rows + (positions * hidden_size if compares else 0) + rows * heads // vocab_size
    return Footprint(
        workspace_bytes=buffers * vocab_size * dtype.itemsize + temporary,
        gradient_bytes=rows * widths * dtype.itemsize + heads * statistics,
        flops=2 * vocab_size * products,
    )
