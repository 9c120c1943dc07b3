"""Checks whether stored features equal those that the target computes now, for each tapped layer.

Where a tap differs, the check looks for the layer that fits. This file knows tensors and layer numbers. It does not
know caches or drafts.

Legend: T tokens, C = taps * H, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor

from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetModel
from deepspec_core.data.collate import pad_ids
from deepspec_core.diagnosis.finding import HELD_OUT, LIVE, PROMPTS, Finding

# Differences that rounding cannot cause: float8 with three bits of mantissa stays within 4%, with a cosine above 0.999.
_LIKE = 0.99
_NEAR = 0.1
LAST = "last"
# A small loss may show only where others add to it.
_EXPLAINS = (LIVE, HELD_OUT, PROMPTS)


@frozen(kw_only=True)
class TapDifference:
    """How the stored features of one tap differ from the live ones, over all tokens of some samples.

    tap: A layer, or "last" for the output of the final norm. cosine: The mean cosine over tokens. typical, largest: The
    median and the maximum over tokens of |stored - live| / |live|. fits: The layer whose live features are nearest to
    the stored ones, and the median difference of the two.
    """

    tap: int | str
    cosine: float
    typical: float
    largest: float
    fits: int | str
    fits_typical: float

    @property
    def agrees(self) -> bool:
        """Whether rounding explains the difference."""
        return self.cosine >= _LIKE and self.typical <= _NEAR


def compare_features(samples: Sequence[Sample], target: TargetModel, taps: Sequence[int]) -> list[TapDifference]:
    """Compare the stored features of samples with the target's own, tap by tap, then the final norm's output."""
    taps = tuple(sorted(taps))
    layers = tuple(range(-1, target.architecture.num_layers - 1))
    stored: list[Tensor] = []
    live: list[Tensor] = []
    for sample in samples:
        assert sample.features is not None, "stored samples have features"
        ids, mask = pad_ids([sample])
        with torch.no_grad():
            found = target.features(ids.to(target.device), mask.to(target.device), None, None, layers)
        live.append(torch.cat([found.hidden[0], found.last_hidden[0]], -1).float().cpu())
        stored.append(torch.cat([sample.features.hidden, sample.features.last_hidden], -1).float())
    stored_TC, live_TC = torch.cat(stored), torch.cat(live)
    numbered: list[int | str] = [*layers, LAST]
    by_layer = dict(zip(numbered, live_TC.chunk(len(numbered), -1), strict=True))
    own: list[int | str] = [*taps, LAST]
    return [_compared(tap, own_TH, by_layer) for tap, own_TH in zip(own, stored_TC.chunk(len(own), -1), strict=True)]


def _compared(tap: int | str, own_TH: Tensor, by_layer: dict[int | str, Tensor]) -> TapDifference:
    apart = {layer: _relative(own_TH, live_TH) for layer, live_TH in by_layer.items()}
    typical = {layer: float(values.median()) for layer, values in apart.items()}
    fits = min(typical, key=typical.__getitem__)
    return TapDifference(
        tap=tap,
        cosine=float(torch.cosine_similarity(own_TH, by_layer[tap], dim=-1).mean()),
        typical=typical[tap],
        largest=float(apart[tap].max()),
        fits=fits,
        fits_typical=typical[fits],
    )


def _relative(own_TH: Tensor, live_TH: Tensor) -> Tensor:
    found: Tensor = (own_TH - live_TH).norm(dim=-1) / live_TH.norm(dim=-1).clamp(min=1e-12)
    return found


def features_finding(compared: Sequence[TapDifference]) -> Finding | None:
    """The finding about features that differ by more than rounding; None if there are none."""
    off = [one for one in compared if not one.agrees]
    if not off:
        return None
    seen = ", ".join(f"{one.tap} (cosine {one.cosine:.3f}, typically {one.typical:.0%} apart)" for one in off)
    moved = [one for one in off if one.tap != LAST and one.fits != one.tap and one.fits_typical <= _NEAR]
    of_taps = [one for one in off if one.tap != LAST]
    if moved and len(moved) == len(of_taps):
        shifts = sorted({one.fits - one.tap for one in moved if isinstance(one.fits, int) and isinstance(one.tap, int)})
        which = ", ".join(f"the stored tap {one.tap} is the target's layer {one.fits}" for one in moved)
        by = f" All are numbered {abs(shifts[0])} too {'low' if shifts[0] > 0 else 'high'}." if len(shifts) == 1 else ""
        return Finding(
            name="layer numbering",
            says=f"The features that training read are of other layers than their numbers say: {which}.{by}",
            fix="Make the cache again, or convert it with the right layer numbers, and train again.",
            explains=_EXPLAINS,
        )
    return Finding(
        name="features",
        says=f"The features that training read are not those of the target now, at layers {seen}. No other layer of "
        "the target fits them.",
        fix="Make the cache again with the target that is evaluated (--force cache), and train again.",
        explains=_EXPLAINS,
    )
