"""Numbers of a draft's config.json that the library of model families, and engines, compute with unchecked.

Knows keys that families share, not families, nor what the algorithms read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deepspec_core.config.bounds import MANY
from deepspec_core.errors import CheckpointError

_LARGEST_HEAD = 2**20
_LARGEST_BASE = 1e15
_EPSILON, _POSITIONS = "rms_norm_eps", "max_position_embeddings"


def check_numbers(fields: Mapping[str, Any], path: Path) -> None:
    """CheckpointError, naming the key, where a number cannot be what the key says. `path`: config.json.

    The keys are those of a head's size, rotary bases, the number that norms add, and the number of positions.
    """
    for key, size in fields.items():
        if key.endswith("head_dim") and type(size) is int and not 0 < size <= _LARGEST_HEAD:
            raise _unusable(path, key, size, f"the size of a head, from 1 to {_LARGEST_HEAD:,}")
    epsilon, positions = fields.get(_EPSILON), fields.get(_POSITIONS)
    if _EPSILON in fields and (epsilon is None or type(epsilon) not in (int, float) or not 0 < epsilon <= 1):
        raise _unusable(path, _EPSILON, epsilon, "a number above 0, at most 1")
    if positions is not None and (type(positions) is not int or not 0 < positions <= MANY):
        raise _unusable(path, _POSITIONS, positions, f"a whole number from 1 to {MANY:,}")
    for key, base in _bases(fields):
        if type(base) not in (int, float) or not 1 < base <= _LARGEST_BASE:
            raise _unusable(path, key, base, f"a number above 1, at most {_LARGEST_BASE:g}")


def _bases(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The rotary bases by their keys, for all layers or by kind of layer; None where an entry lacks its base.

    Without `rope_parameters` and `rope_theta`, the family's own base is meant.
    """
    common = fields.get("rope_theta")
    if common is not None:
        yield "rope_theta", common
    for key in ("rope_parameters", "rope_scaling"):
        whole = fields.get(key)
        if not isinstance(whole, Mapping):
            continue
        parts = {f"{key}.{kind}": part for kind, part in whole.items() if isinstance(part, Mapping)}
        needed = () if common is not None or key == "rope_scaling" else tuple(parts or [key])
        for name, entry in {key: whole, **parts}.items():
            base = entry.get("rope_theta")
            if base is not None or name in needed:
                yield f"{name}.rope_theta", base


def _unusable(path: Path, key: str, found: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path.name} cannot be used", where=f"{path}: {key}", found=repr(found)[:80], expected=expected
    )
