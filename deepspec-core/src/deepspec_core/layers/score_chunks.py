"""How attention that forms its scores in chunks cuts its queries, and which keys a chunk is given.

On a CPU every new shape of a bf16 product costs a kernel of its own: milliseconds to make and some 300 KiB to keep.
Chunks whose keys each end at another token would make thousands of them. So queries and keys come in few sizes, and
a chunk is given some keys that it does not see, which its mask hides. Knows sizes. Does not know who sees what.
"""

from __future__ import annotations

from typing import Final

__all__ = ["few_lengths", "queries_a_chunk"]

_GRAIN: Final = 128
_MOST_LENGTHS: Final = 32


def queries_a_chunk(most_scores: int, scores_a_query: int) -> int:
    """How many queries a chunk has: a multiple of 128 or a power of two, at least one.

    Their scores are at most `most_scores` if those of one query, `scores_a_query`, are.
    """
    size = max(1, most_scores // max(1, scores_a_query))
    return size // _GRAIN * _GRAIN if size > _GRAIN else 1 << size.bit_length() - 1


def few_lengths(seen: slice, num_tokens: int) -> slice:
    """A slice of `num_tokens` keys that holds the keys `seen`, and begins and ends at one of at most 33 places."""
    grain = _GRAIN * -(-num_tokens // (_GRAIN * _MOST_LENGTHS))
    return slice(seen.start // grain * grain, min(-(-seen.stop // grain) * grain, num_tokens))
