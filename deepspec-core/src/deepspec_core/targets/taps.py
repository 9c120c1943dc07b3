"""Which decoder layers may be tapped. Imports nothing heavy, so that run files are checked without torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from deepspec_core.errors import TargetError

__all__ = ["check_taps", "spread_taps"]


def check_taps(taps: Sequence[int], num_layers: int, *, where: object = None) -> tuple[int, ...]:
    """The taps as a tuple, if a target of `num_layers` decoder layers has them.

    Id j is the output of decoder layer j, -1 the embedding output. The last layer is no tap: what drafts see of it is
    the normed last hidden state. Raises TargetError where there are none, or they are out of range or not strictly
    increasing; `where` names the key or file they come from.
    """
    taps = tuple(taps)
    last = num_layers - 1
    outside = [tap for tap in taps if not -1 <= tap < last]
    problem = None
    if not taps:
        problem = "no target layer is tapped"
    elif last in outside:
        problem = "the last decoder layer cannot be tapped"
    elif outside:
        problem = "tapped layers are out of range"
    elif any(right <= left for left, right in pairwise(taps)):
        problem = "tapped layers must be strictly increasing"
    if problem is None:
        return taps
    raise TargetError(
        problem,
        where=where,
        found=list(taps),
        expected=f"increasing ids from -1 (the embedding) to {last - 1}; the target has {num_layers} decoder layers",
        fix=_fix(taps, outside, last),
    )


def spread_taps(num_layers: int, count: int = 5) -> tuple[int, ...]:
    """`count` layers, evenly spaced from layer 1 to the third last of `num_layers`, or fewer.

    Where those are fewer than `count`, the second last joins, then layer 0, then the embedding (-1).
    """
    first, last = 1, num_layers - 3
    for wider_first, wider_last in ((1, num_layers - 2), (0, num_layers - 2), (-1, num_layers - 2)):
        if last - first + 1 < count:
            first, last = wider_first, wider_last
    count = min(count, last - first + 1)
    return tuple(first + round(index * (last - first) / max(1, count - 1)) for index in range(count))


def _fix(taps: Sequence[int], outside: Sequence[int], last: int) -> str:
    if not taps:
        return f"Name a few layers spread over the target, such as {[last // 4, last // 2, 3 * last // 4]}."
    if outside:
        return f"Leave out or lower {', '.join(map(str, outside))}."
    return f"Write {sorted(set(taps))}."
