"""The block mask of flex attention for queries that each see one interval of keys, from where the intervals lie.

The blocks that are seen wholly, in part or not at all follow from the least and the greatest end of each block of
queries. So nothing of the size queries times keys is formed, as torch's create_block_mask does. Does not wait for the
device. Knows intervals; not what the keys and queries are.

Legend: B sequences, Q queries, T keys, X queries with padding to whole blocks, Y blocks of queries, Z blocks of keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

__all__ = ["FLEX_BLOCK", "InSight", "interval_mask"]

InSight = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""in_sight(batch, head, query, key): whether the query sees the key; flex attention's mask_mod."""
FLEX_BLOCK: Final = 128
"""Queries, and keys, of one block of a mask."""


def interval_mask(first_BQ: Tensor | None, limits_BQ: Tensor, num_tokens: int, in_sight: InSight) -> BlockMask:
    """The mask of queries that see the keys from first[b, q] up to, but without, limits[b, q], of `num_tokens`.

    first None: from key 0. B may be 1 for any batch. `in_sight` says the same of single keys, in blocks that are seen
    in part.
    """
    # Of the key blocks [begin, end) that a query block sees, those of [full, partial) are seen by all its queries.
    num_queries, last = limits_BQ.shape[1], -(-num_tokens // FLEX_BLOCK) - 1
    padding = (0, -num_queries % FLEX_BLOCK)
    limits_BX = F.pad(limits_BQ, padding)
    first_BX = torch.zeros_like(limits_BX) if first_BQ is None else F.pad(first_BQ, padding)
    limits_BYX, first_BYX = (rows.view(len(rows), -1, FLEX_BLOCK) for rows in (limits_BX, first_BX))
    # Padding queries see nothing, which would make their block's full key blocks partial: leave them out of the least.
    padded_YX = (torch.arange(limits_BX.shape[1], device=limits_BQ.device) >= num_queries).view(-1, FLEX_BLOCK)
    begin_BY = first_BYX.masked_fill(padded_YX, num_tokens).amin(-1) // FLEX_BLOCK
    end_BY = torch.maximum(-(-limits_BYX.amax(-1) // FLEX_BLOCK), begin_BY)
    full_BY = torch.minimum(-(-first_BYX.amax(-1) // FLEX_BLOCK), end_BY)
    partial_BY = torch.maximum(limits_BYX.masked_fill(padded_YX, num_tokens).amin(-1) // FLEX_BLOCK, full_BY)
    order_Z = torch.arange(last + 1, device=limits_BQ.device)
    full_indices_BYZ = full_BY[..., None] + order_Z
    skipped_BYZ = (partial_BY - full_BY)[..., None] * (order_Z >= (full_BY - begin_BY)[..., None])
    partial_indices_BYZ = begin_BY[..., None] + order_Z + skipped_BYZ

    def shaped(tensor: Tensor) -> Tensor:
        return tensor[:, None].to(torch.int32).contiguous()

    return BlockMask.from_kv_blocks(
        shaped(end_BY - begin_BY - (partial_BY - full_BY)),
        shaped(partial_indices_BYZ.clamp(max=last)),
        shaped(partial_BY - full_BY),
        shaped(full_indices_BYZ.clamp(max=last)),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=in_sight,
        seq_lengths=(num_queries, num_tokens),
    )
