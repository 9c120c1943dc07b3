"""The hidden states of a short text, recorded when a stage begins. Its servers must give the same as long as it runs.

The file is in the stage's folder, in safetensors. It holds the states and not a digest of them, because the same target
in another engine or on another accelerator gives numbers that differ by rounding. Knows one file and the bounds; knows
no servers.

Legend: T tokens, H hidden size, C = taps * H.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from attrs import frozen
from safetensors import SafetensorError, safe_open

from deepspec_core.checkpoints.weight_file import write_tensors
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.errors import StageError
from deepspec_core.features.finite import all_finite
from deepspec_core.features.served.server_probe import MOST_ERROR, Reference, differences

if TYPE_CHECKING:
    from deepspec_core.features.served.asking import FeatureWork

# How far two engines of one target are apart that compute in the same precision.
# float32: other kernels stay below 0.001, and one rounding to bfloat16 alone is 0.0016.
# bfloat16, float16: each side is below 0.03 from the exact states, so they are 0.03 * sqrt(2) apart.
# float8 files: rounding to them is 0.026 on each side, on top of bfloat16: sqrt(0.045^2 + 2 * 0.026^2).
_BOUNDS: Final = {"float32": 1e-3, "bfloat16": 0.045, "float16": 0.045, "float8_e4m3": 0.06}


@frozen(kw_only=True, eq=False)
class ServedRecord:
    """A stage's beginning.

    ids: [T], the text. features: [T, C] and [T, H], the first server's. stored: the files' number format.
    precisions: What the servers computed in. spread: the largest error of one of them beside the first.
    """

    ids: torch.Tensor
    features: TargetFeatures
    stored: str
    precisions: tuple[str, ...]
    spread: float

    @classmethod
    def of(cls, work: FeatureWork, first: str) -> ServedRecord:
        """Of the servers that were tried, by the states of the one at the address `first`."""
        reference = work.by_name(work.tried[first])
        errors = [one.error for given in work.tried.values() for one in differences(work.by_name(given), reference)]
        assert work.stored is not None, "a server was tried"
        return cls(
            ids=work.sample,
            features=work.tried[first],
            stored=work.stored,
            precisions=tuple(sorted(set(work.precisions.values()))),
            spread=max(errors),
        )

    @property
    def bound(self) -> float:
        """The largest accepted error. Servers that differed at the start may differ as much later."""
        return min(MOST_ERROR, max(2 * self.spread, *(_BOUNDS[name] for name in self.precisions)))

    def reference(self, work: FeatureWork, *, where: Path) -> Reference:
        """What servers are compared with. StageError where the record is of another text, or of other layers."""
        width = len(work.layers.taps) * work.hidden_size
        expected = [(len(work.sample), width), (len(work.sample), work.hidden_size)]
        found = [tuple(self.features.hidden.shape), tuple(self.features.last_hidden.shape)]
        if not torch.equal(self.ids, work.sample) or found != expected:
            raise _unusable(where, f"states of {found} of a text of {len(self.ids)} tokens", f"{expected} of the text")
        return Reference(
            states=work.by_name(self.features),
            whose="the servers that the stage was begun with",
            most=self.bound,
            precisions=self.precisions,
        )

    def write(self, path: Path) -> None:
        """Write atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        tensors = {"token_ids": self.ids, "hidden": self.features.hidden, "last_hidden": self.features.last_hidden}
        said = {"stored": self.stored, "precisions": json.dumps(self.precisions), "spread": repr(self.spread)}
        write_tensors(partial, {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=said)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)


def read_record(path: Path) -> ServedRecord:
    """The record of a stage. StageError where it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            ids, hidden, last = (file.get_tensor(name) for name in ("token_ids", "hidden", "last_hidden"))
        precisions, spread = tuple(json.loads(said["precisions"])), float(said["spread"])
        known = bool(precisions) and {*precisions, said["stored"]} <= _BOUNDS.keys()
        if not known or not 0 <= spread <= 2 or not all_finite(hidden) or not all_finite(last):
            raise ValueError(f"stored = {said['stored']}, precisions = {precisions}, spread = {spread}")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise _unusable(path, str(error), "states and what they were computed in") from error
    return ServedRecord(
        ids=ids,
        features=TargetFeatures(hidden=hidden, last_hidden=last),
        stored=said["stored"],
        precisions=precisions,
        spread=spread,
    )


def _unusable(path: Path, found: str, expected: str) -> StageError:
    return StageError(
        "The record of the servers' features cannot be used",
        where=path,
        found=found,
        expected=expected,
        fix=f"Run again with --force {path.parent.name}, or choose another output.",
    )
