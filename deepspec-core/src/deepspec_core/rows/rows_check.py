"""Checks the rows that a draft returns against contracts/rows.py: shapes, dtypes, order, ranges.

Shapes are checked on the host, and values in the host's copies of the tensors (host_side.py). Every check takes as many
operations as there are rows, so it is made in every step. Knows rows and heads. Does not know which draft made them;
the caller adds that (`RowsError.of`).

Legend: N rows, P target positions, H hidden size, V the target's vocabulary, D the draft's, G slots, r rank of the
correction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.errors import PluginError
from deepspec_core.plugins.origin import component_of, package_of
from deepspec_core.rows.host_side import differing, host_side

# Stands for the number of slots if one head serves any number of them.
_ANY_SLOT = 2**62


class RowsError(PluginError):
    """Rows break the contract. `field` names the field of the rows that is wrong."""

    def __init__(self, field: str, found: object, expected: str, *, where: str | None = None) -> None:
        self.field = field
        super().__init__(
            f"a draft returns rows that cannot be used: `{field}`", where=where, found=found, expected=expected
        )

    def of(self, draft: object) -> RowsError:
        """The same, with the package and the class of the draft that made the rows."""
        where = f"{package_of(draft)}, {component_of(draft)}"
        return RowsError(self.field, self.found, str(self.expected), where=where)


def check_shapes(rows: Any, heads: Any) -> None:
    """Raise RowsError if a tensor is missing, or has another shape, kind of numbers or device. Reads no numbers."""
    if not isinstance(rows, Rows):
        raise RowsError("forward()", type(rows).__name__, "contracts.rows.Rows")
    if not isinstance(heads, Heads):
        raise RowsError("heads()", type(heads).__name__, "contracts.rows.Heads")
    _is_head("heads().draft", heads.draft, None)
    _is("hidden", rows.hidden, None, heads.draft.shape[-1])
    count, known = len(rows.hidden), heads.draft.shape[-2]
    _is("heads().target", heads.target, known if heads.draft_ids is None else None, None)
    if heads.draft_ids is not None:
        _is("heads().draft_ids", heads.draft_ids, known, dtype=torch.int64)
    if rows.correction is not None:
        _is_head("heads().correction", heads.correction, known)
        assert heads.correction is not None
        _is("correction", rows.correction, count, heads.correction.shape[-1])
    if rows.target_hidden is None and rows.target_ids is None:
        raise RowsError("target_ids", None, "labels [N], or target_hidden, whose argmax is the label")
    if (rows.target_hidden is None) != (rows.target_index is None):
        raise RowsError(
            "target_index",
            "one of target_hidden and target_index, without the other",
            "both, or neither",
        )
    if rows.target_hidden is not None:
        _is("target_hidden", rows.target_hidden, None, heads.target.shape[1])
        _is("target_index", rows.target_index, count, dtype=torch.int64)
    if rows.target_ids is not None:
        _is("target_ids", rows.target_ids, count, dtype=torch.int64)
    _is("weight", rows.weight, count)
    _is("slot", rows.slot, count, dtype=torch.int64)
    _is("block", rows.block, count, dtype=torch.int64)
    for name, extra in rows.extras.items():
        if not isinstance(extra, Tensor) or extra.dim() == 0 or len(extra) != count:
            raise RowsError(f"extras[{name!r}]", _kind(extra), f"[{count}, ...], as many as there are rows")
    if rows.denominator is not None:
        _is("denominator", rows.denominator)
    _one_device(rows)
    for pair in rows.on_host:
        of, copy = pair if isinstance(pair, tuple) and len(pair) == 2 else (None, pair)
        if not isinstance(of, Tensor) or not isinstance(copy, Tensor) or copy.shape != of.shape:
            raise RowsError("on_host", _kind(copy), f"pairs of a tensor and its copy on the host, here of {_kind(of)}")


def check_told(rows: Rows) -> None:
    """Raise RowsError if the host was told other numbers than the rows have. On a CPU, where looking costs nothing."""
    if rows.hidden.device.type == "cpu" and (name := differing(rows)) is not None:
        raise RowsError("on_host", f"other numbers than `{name}` has", "copies of the rows' own tensors")


def check_numbers(rows: Rows, heads: Heads, *, new_ids: bool = True) -> None:
    """Raise RowsError if numbers are out of range or order. Of rows that are there: those of weight 0 were taken out.

    `rows` come from `weighted`, so `on_host` is complete. `new_ids` is false if these `heads.draft_ids` were looked at
    before; looking at them waits for the device.
    """
    if not len(rows.hidden):
        return
    host = host_side(rows)
    block_N, slot_N, weight_N = host["block"], host["slot"], host["weight"]
    same_N = block_N[1:] == block_N[:-1]
    right = {
        "weight": ((weight_N >= 0) & weight_N.isfinite()).all(),
        "block": (block_N[1:] >= block_N[:-1]).all(),
        "slot": ((slot_N[1:] > slot_N[:-1]) | ~same_N).all() & (slot_N >= 0).all() & (slot_N < _slots(heads)).all(),
    }
    if rows.target_hidden is not None:
        right["target_index"] = _within(host["target_index"], len(rows.target_hidden))
    if rows.target_ids is not None:
        right["target_ids"] = _within(host["target_ids"], heads.target.shape[0])
    if heads.draft_ids is not None and new_ids:
        ids_D = heads.draft_ids.cpu()
        right["heads().draft_ids"] = _within(ids_D, heads.target.shape[0]) & (ids_D[1:] > ids_D[:-1]).all()
    if rows.denominator is not None:
        right["denominator"] = (host["denominator"].isfinite() & (host["denominator"] > 0)).all()
    for field, is_right in zip(right, torch.stack(list(right.values())).tolist(), strict=True):
        if not is_right:
            values: Any = heads.draft_ids if field == "heads().draft_ids" else host[field]
            raise RowsError(field, _extent(values), _expected(field, rows, heads))


def _expected(field: str, rows: Rows, heads: Heads) -> str:
    positions = 0 if rows.target_hidden is None else len(rows.target_hidden)
    return {
        "weight": "finite numbers, none below 0",
        "block": "numbers that do not decrease from row to row",
        "slot": "numbers from 0 on that increase within a block"
        + (f", below {slots}, the number of heads" if (slots := _slots(heads)) < _ANY_SLOT else ""),
        "target_index": f"from 0 to below {positions}, the number of target positions",
        "target_ids": f"token ids from 0 to below {heads.target.shape[0]}",
        "heads().draft_ids": f"token ids from 0 to below {heads.target.shape[0]} that increase",
        "denominator": "a finite number above 0, where rows have a weight",
    }[field]


def _within(index_N: Tensor, size: int) -> Tensor:
    return ((index_N >= 0) & (index_N < size)).all()


def _extent(values: Tensor) -> str:
    numbers = values.flatten().tolist()
    shown = ", ".join(f"{number:g}" for number in numbers[:8])
    more = ", ..." if len(numbers) > 8 else ""
    return f"{shown}{more}; from {min(numbers):g} to {max(numbers):g}"


def _is(field: str, value: Any, *shape: int | None, dtype: torch.dtype | None = None) -> None:
    """Raise RowsError unless it is a tensor of this shape (None: any size), of `dtype` or else of floating point."""
    fits = isinstance(value, Tensor) and value.dim() == len(shape)
    fits = fits and all(size in (None, real) for size, real in zip(shape, value.shape, strict=True))
    if not fits or (value.dtype != dtype if dtype is not None else not value.is_floating_point()):
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise RowsError(field, _kind(value), f"[{sizes}], {dtype or 'of a floating-point type'}")


def _is_head(field: str, value: Any, columns: int | None) -> None:
    by_slot = isinstance(value, Tensor) and value.dim() == 3
    _is(field, value, *((None,) if by_slot else ()), columns, None)


def _slots(heads: Heads) -> int:
    """How many slots there are heads for."""
    by_slot = [head for head in (heads.draft, heads.correction) if head is not None and head.dim() == 3]
    return min((len(head) for head in by_slot), default=_ANY_SLOT)


def _one_device(rows: Rows) -> None:
    device = rows.hidden.device
    for field in ("correction", "target_hidden", "target_index", "target_ids", "weight", "slot", "block"):
        value = getattr(rows, field)
        if value is not None and value.device != device:
            raise RowsError(field, f"a tensor on {value.device}", f"one on {device}, as `hidden`")


def _kind(value: Any) -> str:
    return f"{list(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
