"""How rows are cut into chunks, and for which target positions each chunk must form logits. Decided once, on the host.

Chunks hold whole blocks. Neighbouring blocks are compared with the same target positions. So a window keeps the logits
of positions that a later chunk needs again, and the logits of each position are formed once. Knows indices only, and
not what is computed.

Legend: N rows, M blocks, U rows of the window.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray
from torch import Tensor

from deepspec_core.rows.host_side import sent

_Indices = NDArray[np.int64]


@frozen(kw_only=True, eq=False)
class Chunk:
    """One chunk, and the target window that it is compared with. Without a target, all but `span` are None.

    span: The rows of the chunk.
    kept_U: The rows of the previous window that stay. They come first in this window. Some may be for later chunks.
    fresh_U: The target positions whose logits are formed anew. They come next, and some may be for later chunks.
    window_row_N: The row of the window that holds the target position of each row of the chunk.
    """

    span: slice
    kept_U: Tensor | None = None
    fresh_U: Tensor | None = None
    window_row_N: Tensor | None = None


@frozen(kw_only=True, eq=False)
class RowPlan:
    """The chunks in order. `most_rows` is the length of the longest chunk, `window_rows` that of the longest window."""

    chunks: tuple[Chunk, ...]
    most_rows: int
    window_rows: int


def plan_rows(
    block_N: Tensor,
    target_index_N: Tensor | None,
    *,
    chunk_rows: int,
    most_kept: int = 0,
    device: torch.device | None = None,
) -> RowPlan:
    """Cut the rows into chunks of at most `chunk_rows` rows; a longer block is a chunk of its own.

    The arguments are on the host, and the chunks' tensors on `device` (None: on the host too). Does not wait for it.

    A window holds the positions that its chunk needs, and some that later chunks need. Positions of the previous window
    are kept while they fit into `most_kept` rows (at least `chunk_rows`); those that are needed soonest come first.
    Where positions have to be formed, others that are needed soon are formed with them, up to the rows of a chunk,
    because a product of few rows takes nearly as long as one of many. If blocks come in the order of their target
    positions, each position is formed once. Positions that did not fit are formed again.
    """
    if target_index_N is None:
        spans, most_rows = _spans(block_N, chunk_rows)
        return RowPlan(chunks=tuple(Chunk(span=span) for span in spans), most_rows=most_rows, window_rows=0)
    spans, most_rows = _spans(block_N, chunk_rows)
    index: _Indices = target_index_N.numpy()
    needed = [np.unique(index[span]) for span in spans]
    next_use, following = _uses(needed)
    held: _Indices = np.zeros(0, dtype=np.int64)
    place = np.full(len(next_use), -1)  # the row of the window that holds a position
    parts: list[_Indices] = []  # kept, fresh and window rows of every chunk, copied to the device as one tensor
    window_rows = 0
    for span, positions, then in zip(spans, needed, following, strict=True):
        next_use[positions] = then
        wanted = np.zeros(len(next_use), dtype=np.bool_)
        wanted[positions] = True
        fresh = positions[place[positions] < 0]
        room = max(0, max(chunk_rows, most_kept) - len(positions))
        later = _soonest(np.flatnonzero(~wanted[held] & (next_use[held] < len(spans))), next_use[held], room)
        kept = np.sort(np.concatenate((np.flatnonzero(wanted[held]), later)))
        if len(fresh):
            ahead = np.flatnonzero(~wanted & (place < 0) & (next_use < len(spans)))
            fresh = np.concatenate((fresh, _soonest(ahead, next_use, max(0, most_rows - len(kept) - len(fresh)))))
        place[held] = -1
        held = np.concatenate((held[kept], fresh))
        place[held] = np.arange(len(held))
        parts += [kept, fresh, place[index[span]]]
        window_rows = max(window_rows, len(held))
    sizes = [len(part) for part in parts]
    moved = torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.int64)
    pieces = torch.split(moved if device is None else sent(moved, device), sizes)
    chunks = [
        Chunk(span=span, kept_U=kept_U, fresh_U=fresh_U, window_row_N=row_N)
        for span, kept_U, fresh_U, row_N in zip(spans, pieces[::3], pieces[1::3], pieces[2::3], strict=True)
    ]
    return RowPlan(chunks=tuple(chunks), most_rows=most_rows, window_rows=window_rows)


def _uses(needed: list[_Indices]) -> tuple[_Indices, list[_Indices]]:
    """The first chunk that needs each position, and for each chunk's positions the next; len(needed) is never."""
    sizes = [len(positions) for positions in needed]
    position, chunk = np.concatenate([np.zeros(0, dtype=np.int64), *needed]), np.repeat(np.arange(len(needed)), sizes)
    order = np.argsort(position, kind="stable")
    again = position[order[1:]] == position[order[:-1]]
    following = np.full(len(position), len(needed))
    following[order[:-1][again]] = chunk[order[1:][again]]
    first = np.full(position.max(initial=-1) + 1, len(needed))
    np.minimum.at(first, position, chunk)
    ends = np.cumsum(sizes, dtype=np.int64)
    return first, [following[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _soonest(places: _Indices, next_use: _Indices, most: int) -> _Indices:
    """Those of `places` that are needed soonest, at most `most`."""
    return places[np.argsort(next_use[places], kind="stable")[:most]]


def chunk_spans(block_N: Tensor, chunk_rows: int) -> Iterator[tuple[int, int]]:
    """The (start, end) of chunks of whole blocks: at most `chunk_rows` rows each, or one longer block.

    All chunks have about the same size, because a last chunk of a few rows would take nearly as long as a full one.
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
    """The (start, end) of chunks of blocks that have `counts` rows, each chunk filled up to `most`."""
    start = end = 0
    for count in counts:
        if end > start and end + count - start > most:
            yield start, end
            start = end
        end += count
    yield start, end


def _spans(block_N: Tensor, chunk_rows: int) -> tuple[list[slice], int]:
    """The number of chunks, and the rows of the longest."""
    ends = list(chunk_spans(block_N, chunk_rows))
    return [slice(*pair) for pair in ends], max((end - start for start, end in ends), default=0)
