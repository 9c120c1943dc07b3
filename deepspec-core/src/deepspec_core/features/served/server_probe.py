"""Compares the hidden states that servers compute for one text with the target in this process, or with each other.

The result has, for each state, its error and the likely kind of error. A state that belongs to another layer or another
model is refused. Servers receive token ids, so a server's own chat template plays no part. Knows states; uses no server
and no target.

The error of a state is the median over tokens of |found - reference| / |reference|. The median is used because, in many
models, the first tokens of a text have states of another magnitude. A token with an error of e has a cosine of at least
about 1 - e^2 / 2.

Legend: T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from attrs import frozen
from torch import Tensor

from deepspec_core.errors import ConfigError
from deepspec_core.servers.probe import NotServed

# A cosine of 0.989. Rounding to bfloat16 throughout a deep target stays below 0.03, and 8-bit weights and activations
# below 0.1; a target with an error beyond this no longer says what the draft is to predict.
MOST_ERROR: Final = 0.15
# Another layer that is so much closer than the layer asked for is the one that was given.
_CLOSER: Final = 0.5
_LIKE: Final = (
    (1e-3, "like another kernel in float32"),
    (0.03, "like rounding to bfloat16"),
    (MOST_ERROR, "like 8-bit weights, activations or files"),
)


@frozen(kw_only=True)
class Difference:
    """How one state of a text differs from the reference.

    state: Its name. error, cosine: the median over tokens, and the mean. largest: the largest difference of a number;
    among: the largest number of the reference. nearest: the name of another state of the reference that is clearly
    closer, and that one's error; None where there is none.
    """

    state: str
    error: float
    cosine: float
    largest: float
    among: float
    nearest: tuple[str, float] | None

    @property
    def refused(self) -> bool:
        """Whether it is not the state that was asked for."""
        return self.nearest is not None or not self.error <= MOST_ERROR

    def __str__(self) -> str:
        said = f"{self.state}: error {self.error:.2g}, cosine {self.cosine:.4f}"
        if self.nearest is not None:
            return f"{said}; it is nearer to {self.nearest[0]} (error {self.nearest[1]:.2g})"
        return said


def differences(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> list[Difference]:
    """Each state of `found` [T, H] beside the one of that name in `reference`, which may have more of them."""
    made = []
    for name, state_TH in found.items():
        own_TH = reference[name].float()
        errors = {other: _error(state_TH.float(), value_TH.float()) for other, value_TH in reference.items()}
        nearest = min(errors, key=errors.__getitem__)
        closer = nearest != name and errors[nearest] < _CLOSER * errors[name]
        made.append(
            Difference(
                state=name,
                error=errors[name],
                cosine=float(torch.cosine_similarity(state_TH.float(), own_TH, dim=-1).mean()),
                largest=float((state_TH.float() - own_TH).abs().max()),
                among=float(own_TH.abs().max()),
                nearest=(nearest, errors[nearest]) if closer else None,
            )
        )
    return made


@frozen(kw_only=True, eq=False)
class Reference:
    """What the states of the short text have to be like: a server that comes, or comes back, is compared with it.

    states: By name, [T, H]. whose: their source, for messages. most: the largest accepted error.
    precisions: What the states may have been computed in, where that matters (precision_of).
    """

    states: Mapping[str, Tensor]
    whose: str
    most: float = MOST_ERROR
    precisions: tuple[str, ...] | None = None

    def require(self, found: Mapping[str, Tensor], precision: str, *, where: str) -> str:
        """How `found` compares, in a line. NotServed where it is another model's, or computed in another precision."""
        compared = differences(found, self.states)
        require_alike(compared, where=where, whose=self.whose, most=self.most, kind=NotServed)
        if self.precisions is not None and precision not in self.precisions:
            raise NotServed(
                "A server computes in another precision",
                where=where,
                found=f"{precision}, {summary(compared)}",
                expected=f"{' or '.join(self.precisions)}, as {self.whose}",
                fix="Start the server with the --dtype that the others had: `deepspec serve`.",
            )
        return f"compared with {self.whose}: {summary(compared)}"


def precision_of(states: Tensor) -> str:
    """The precision that states were computed in, as far as the numbers show it, whatever type they are stored in.

    An engine that computes in bfloat16 keeps its residual stream in it, so a wider file has nothing in its lower bits.
    """
    for dtype in (torch.bfloat16, torch.float16):
        if states.dtype == torch.float32 and torch.equal(states.to(dtype).float(), states):
            return str(dtype).removeprefix("torch.")
    return str(states.dtype).removeprefix("torch.")


def require_alike(
    compared: Sequence[Difference],
    *,
    where: str,
    whose: str,
    most: float = MOST_ERROR,
    kind: type[ConfigError] = ConfigError,
) -> None:
    """An error of `kind` where a state is not the one that was asked for. `whose` is the reference."""
    refused = [one for one in compared if one.refused or not one.error <= most]
    if not refused:
        return
    moved = [one for one in refused if one.nearest is not None]
    raise kind(
        "A server counts layers otherwise" if moved else "A server's features are not those of this target",
        where=where,
        found="; ".join(map(str, refused)),
        expected=f"those of {whose}, with an error of at most {most:.2g}",
        fix="Engines count layer L of target.layers as L + 1. Start the server with `deepspec serve` for this run file."
        if moved
        else "Look for another model, revision, precision or quantisation; features.probe says what is compared.",
    )


def summary(compared: Sequence[Difference]) -> str:
    """One line on states that are alike enough."""
    worst = max(compared, key=lambda one: one.error)
    like = next(words for bound, words in _LIKE if worst.error <= bound)
    largest = max(compared, key=lambda one: one.largest)
    if worst.error == 0:
        return "the same to the bit"
    return (
        f"errors of at most {worst.error:.2g} ({worst.state}), {like}; numbers at most {largest.largest:.2g} apart, "
        f"among numbers up to {largest.among:.3g}"
    )


def _error(found_TH: Tensor, reference_TH: Tensor) -> float:
    size_T = reference_TH.norm(dim=-1).clamp(min=1e-30)
    return float(((found_TH - reference_TH).norm(dim=-1) / size_T).median())
