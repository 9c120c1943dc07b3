"""Checks whether a loss term declares what it needs and returns one number per row, as contracts/loss.py requires.

Knows the contract's members and shapes. Does not know which plugin a term comes from, or what it computes.

Legend: N rows of a chunk.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deepspec_core.errors import PluginError


def check_members(term: Any, name: str, package: str) -> None:
    """Raise PluginError if a loss term cannot be called, or does not say what it reads."""
    missing = [member for member in ("needs_target", "needs_extras") if not hasattr(term, member)]
    missing += [] if callable(term) else ["__call__"]
    found = f"{type(term).__name__} without {', '.join(missing)}" if missing else None
    if not missing and not isinstance(term.needs_target, bool):
        found = f"needs_target = {term.needs_target!r}"
    elif not missing and (isinstance(term.needs_extras, str) or not all(isinstance(x, str) for x in term.needs_extras)):
        found = f"needs_extras = {term.needs_extras!r}"
    if found is not None:
        raise PluginError(
            f"{name!r} is not a loss term",
            where=package,
            found=found,
            expected="needs_target (a bool), needs_extras (a tuple of names) and __call__ (contracts.loss.LossTerm)",
        )


def one_a_row(value: Any, count: int, what: str) -> Tensor:
    """The value of a term or weighting. Raises PluginError unless it is [count]: torch would spread any other over the
    rows.

    `what` names the term or weighting in messages. No values are read.
    """
    if isinstance(value, Tensor) and tuple(value.shape) == (count,) and value.is_floating_point():
        return value
    raise PluginError(
        f"{what} does not return one number per row",
        where="[loss]",
        found=f"{list(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__,
        expected=f"a tensor of shape [{count}] for {count} rows, of a floating-point type",
        fix="return what was computed from each row, not its mean or sum",
    )
