"""Decides which conversations share a row: the fewest rows that hold them, about equally full, for little padding.

Knows indices and lengths. Does not know what is in a row, or which samples a step has.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Final

_LEAST_FULL: Final = 0.75


def packed_rows(indices: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The samples `indices` in rows of at most `capacity` tokens, fullest first. `lengths` are those of all samples.

    Longest first, each goes to the emptiest row (Graham 1969, longest processing time first); of the numbers of rows
    in which that fits, the smallest counts. A sample of `capacity` tokens or more has a row of its own. The same
    samples in any order give the same rows.
    """
    order = sorted(indices, key=lambda index: (-lengths[index], index))
    long = [[index] for index in order if lengths[index] >= capacity]
    order, rows = order[len(long) :], [[index] for index in order[len(long) :]]
    for count in range(-(-sum(lengths[index] for index in order) // capacity), len(order)):
        spread = _spread(order, lengths, count)
        if max(_tokens(row, lengths) for row in spread) <= capacity:
            rows = spread
            break
    return sorted(long + rows, key=lambda row: (-_tokens(row, lengths), row))


def micro_batches(rows: Sequence[list[int]], lengths: Sequence[int], size: int) -> list[list[list[int]]]:
    """At most `size` rows each, in order. One ends early before a row that would be padded by a quarter or more."""
    found: list[list[list[int]]] = []
    for row in rows:
        open_ = found[-1] if found else []
        if not open_ or len(open_) == size or _tokens(row, lengths) <= _LEAST_FULL * _tokens(open_[0], lengths):
            found.append([row])
        else:
            open_.append(row)
    return found


def _spread(order: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(count)]
    emptiest = [(0, number) for number in range(count)]
    for index in order:
        tokens, number = heapq.heappop(emptiest)
        rows[number].append(index)
        heapq.heappush(emptiest, (tokens + lengths[index], number))
    return rows


def _tokens(row: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(lengths[index] for index in row)
