"""How rows are cut into chunks, and which target positions each chunk must form: decided once, on the host.

Chunks hold whole blocks. Neighbouring blocks look at the same target positions, so logits of positions that a later
chunk needs again are kept in a window and every position is formed once. Knows indices only; not what is computed.

Legend: N rows, M blocks, U rows of the window.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray
from torch import Tensor

_Indices = NDArray[np.int64]


@frozen(kw_only=True, eq=False)
class Chunk:
    """Rows `span`. Its window: rows `kept_U` of the one before come first, then `fresh_U`, target positions to form.

    `window_row_N`: where in the window a row's target position stands. The three are None without a target.
    """

    span: slice
    kept_U: Tensor | None = None
    fresh_U: Tensor | None = None
    window_row_N: Tensor | None = None


@frozen(kw_only=True, eq=False)
class RowPlan:
    """Chunks in order. `most_rows`: of any chunk; `window_rows`: of any window."""

    chunks: tuple[Chunk, ...]
    most_rows: int
    window_rows: int


def plan_rows(block_N: Tensor, target_index_N: Tensor | None, *, chunk_rows: int, most_kept: int = 0) -> RowPlan:
    """Chunks of at most `chunk_rows` rows, or one block where it is longer. Waits for the device once.

    A window holds what its chunk needs, and of what only later chunks need, as much as fits `most_kept` rows in all (at
    least `chunk_rows`): where blocks come in the order of their target positions that is everything, and each position
    is formed once; what does not fit is formed again.
    """
    if target_index_N is None:
        chunks = [Chunk(span=slice(*ends)) for ends in chunk_spans(block_N, chunk_rows)]
        return RowPlan(chunks=tuple(chunks), most_rows=_longest(chunks), window_rows=0)
    device = block_N.device
    block_N, index_N = torch.stack((block_N, target_index_N)).cpu()
    spans = [slice(*ends) for ends in chunk_spans(block_N, chunk_rows)]
    index: _Indices = index_N.numpy()
    needed = [np.unique(index[span], return_inverse=True) for span in spans]
    last_use = np.zeros(int(index.max(initial=-1)) + 1, dtype=np.int64)
    for number, (positions, _) in enumerate(needed):
        last_use[positions] = number
    held: _Indices = np.zeros(0, dtype=np.int64)
    parts: list[_Indices] = []  # kept, fresh and window rows of every chunk, to go to the device in one piece
    window_rows = 0
    for number, (positions, inverse) in enumerate(needed):
        used = np.isin(held, positions)
        room = max(chunk_rows, most_kept) - len(positions)
        later = np.flatnonzero(~used & (last_use[held] > number))[: max(0, room)]
        kept = np.sort(np.concatenate((np.flatnonzero(used), later)))
        fresh = np.setdiff1d(positions, held, assume_unique=True)
        held = np.concatenate((held[kept], fresh))
        order = np.argsort(held)
        parts += [kept, fresh, order[np.searchsorted(held, positions, sorter=order)][inverse]]
        window_rows = max(window_rows, len(held))
    sizes = [len(part) for part in parts]
    moved = torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.int64)
    pieces = torch.split(moved.to(device), sizes)
    chunks = [
        Chunk(span=span, kept_U=kept_U, fresh_U=fresh_U, window_row_N=row_N)
        for span, kept_U, fresh_U, row_N in zip(spans, pieces[::3], pieces[1::3], pieces[2::3], strict=True)
    ]
    return RowPlan(chunks=tuple(chunks), most_rows=_longest(chunks), window_rows=window_rows)


def chunk_spans(block_N: Tensor, chunk_rows: int) -> Iterator[tuple[int, int]]:
    """Cut rows into (start, end), of whole blocks: at most `chunk_rows` rows each, or one block where it is longer.

    All are of about one size: a last chunk of a few rows costs nearly as much as a whole one.
    """
    num_rows = block_N.numel()
    if num_rows <= chunk_rows:
        if num_rows:
            yield 0, num_rows
        return
    counts = torch.unique_consecutive(block_N, return_counts=True)[1].tolist()
    fewest = len(list(_filled(counts, chunk_rows)))
    yield from _filled(counts, min(chunk_rows, -(-num_rows // fewest) + max(counts) - 1))


def _filled(counts: list[int], most: int) -> Iterator[tuple[int, int]]:
    """(start, end) of runs of blocks of `counts` rows, each filled up to `most`."""
    start = end = 0
    for count in counts:
        if end > start and end + count - start > most:
            yield start, end
            start = end
        end += count
    yield start, end


def _longest(chunks: list[Chunk]) -> int:
    return max((chunk.span.stop - chunk.span.start for chunk in chunks), default=0)
