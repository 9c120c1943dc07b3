"""How well a draft's confidence predicts verification: ECE, Brier score and AUROC of each proposal position.

A token's confidence is the probability that it is accepted, given that all tokens before it are. The product of the
confidences up to a position is compared with the label, which is whether verification accepted every token up to there.
A position after the first rejected token was not verified by itself, but its prefix is known to be rejected. A position
that was not proposed, or that follows an accepted stop token, has no label and does not count.

This file knows recorded rounds. It does not know drafts, and it does not change a confidence.

Legend: N rounds, K positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from attrs import asdict, frozen

from deepspec_core.decoding.engine import Completion
from deepspec_core.errors import DataError
from deepspec_core.evaluation.turns import prompt_of

# Equal widths on [0, 1]. A bin includes its lower edge and excludes its upper one; the last bin includes both.
ECE_BINS = 20
AUROC_BINS = 1000


@frozen(kw_only=True, eq=False)
class Judged:
    """Rounds whose draft gave confidences for its proposals.

    logits: [N, K] fp64, confidence logits; 0 where nothing was proposed.
    proposed: [N, K], which positions have a label.
    survived: [N, K], whether all tokens up to this position were accepted.
    prompt: [N], the number of the prompt that a round's answer belongs to. Samples, turns and modes share it.
    """

    logits: np.ndarray
    proposed: np.ndarray
    survived: np.ndarray
    prompt: np.ndarray

    def of_rounds(self, chosen: np.ndarray) -> Judged:
        """The rounds that are true in `chosen` [N]."""
        return Judged(
            logits=self.logits[chosen],
            proposed=self.proposed[chosen],
            survived=self.survived[chosen],
            prompt=self.prompt[chosen],
        )


@frozen(kw_only=True)
class Bin:
    """The means over the rounds whose confidence lies in one of the ECE_BINS bins. Bins are numbered from 0."""

    index: int
    rounds: int
    confidence: float
    accepted: float


@frozen(kw_only=True)
class PositionReliability:
    """The figures of one position.

    confidence: The mean product of confidences. accepted: The share of rounds whose prefix survived.

    ece: The mean of |confidence - accepted| over the bins, weighted by their rounds.
    brier: The mean squared difference of the confidence and 0 or 1.
    auroc: The probability that a surviving prefix has a higher confidence than a rejected one. Equal confidences count
        half (histogram of AUROC_BINS bins). None where all prefixes survived, or none did.
    bins: Bins without rounds are left out.
    """

    rounds: int
    accepted: float
    confidence: float
    ece: float
    brier: float
    auroc: float | None
    bins: tuple[Bin, ...]


@frozen(kw_only=True)
class Reliability:
    """All positions, and their means weighted by rounds. None where no position has the figure."""

    ece: float | None
    brier: float | None
    auroc: float | None
    positions: tuple[PositionReliability, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"ece_bins": ECE_BINS, "auroc_bins": AUROC_BINS, **asdict(self)}


def judged(completions: Sequence[Completion]) -> Judged | None:
    """The rounds of finished sequences with their labels; None if the draft gave no confidence.

    Raises DataError if a round does not have exactly one finite confidence for each of its tokens.
    """
    rounds = [(sample, r) for sample, completion in enumerate(completions) for r in completion.rounds]
    if all(r.confidence is None for _, r in rounds):
        return None
    width = max(r.proposal_length for _, r in rounds)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(prompt_of(one.id) for one in completions))}
    logits_NK = np.zeros((len(rounds), width))
    for row, (sample, r) in enumerate(rounds):
        given = () if r.confidence is None else r.confidence
        logits_NK[row, : len(given)] = given
        if len(given) != r.proposal_length or not np.isfinite(logits_NK[row]).all():
            raise DataError(
                "A round's confidences do not fit its proposal",
                where=f"the sample {completions[sample].id}",
                found=f"{list(given)} for {r.proposal_length} tokens"[:200],
                expected="a finite number for each token",
                fix="Look at the draft's confidence head, then evaluate again with --force evaluate.",
            )
    at_K = np.arange(width)
    return Judged(
        logits=logits_NK,
        proposed=at_K < np.array([r.proposal_length for _, r in rounds])[:, None],
        survived=at_K < np.array([r.accepted_draft_length for _, r in rounds])[:, None],
        prompt=np.array([numbers[prompt_of(completions[sample].id)] for sample, _ in rounds]),
    )


def survival(logits_NK: np.ndarray, temperatures_K: Sequence[float] | np.ndarray | None = None) -> np.ndarray:
    """The product of sigmoid(logit / temperature) up to each position, [N, K]. Without temperatures they are 1."""
    scaled_NK = logits_NK if temperatures_K is None else logits_NK / np.asarray(temperatures_K)
    # log sigmoid(x) = -log(1 + exp(-x)), without overflow.
    survival_NK: np.ndarray = np.exp(-np.logaddexp(0.0, -scaled_NK)).cumprod(axis=1)
    return survival_NK


def reliability(rounds: Judged, temperatures_K: Sequence[float] | np.ndarray | None = None) -> Reliability:
    """The figures of all positions. If `temperatures_K` [K] is given, confidence logits are divided by it."""
    confidence_NK = survival(rounds.logits, temperatures_K)
    positions = tuple(
        _position(confidence_NK[rounds.proposed[:, k], k], rounds.survived[rounds.proposed[:, k], k])
        for k in range(confidence_NK.shape[1])
    )
    return Reliability(
        ece=_weighted([(p.ece, p.rounds) for p in positions]),
        brier=_weighted([(p.brier, p.rounds) for p in positions]),
        auroc=_weighted([(p.auroc, p.rounds) for p in positions if p.auroc is not None]),
        positions=positions,
    )


def ece(confidence_N: np.ndarray, survived_N: np.ndarray) -> float:
    """The expected calibration error of probabilities [N] against labels [N] (booleans). N is at least 1."""
    index_N = _bin_of(confidence_N, ECE_BINS)
    # n_b / N * |mean confidence - mean label| = |sum of confidences - number of labels| / N.
    gaps = np.bincount(index_N, weights=confidence_N - survived_N, minlength=ECE_BINS)
    return float(np.abs(gaps).sum() / len(confidence_N))


def auroc(confidence_N: np.ndarray, survived_N: np.ndarray) -> float | None:
    """The area under the ROC curve of probabilities [N] against labels [N] (booleans). None if all labels are equal."""
    index_N = _bin_of(confidence_N, AUROC_BINS)
    positive = np.bincount(index_N[survived_N], minlength=AUROC_BINS)
    negative = np.bincount(index_N[~survived_N], minlength=AUROC_BINS)
    pairs = int(positive.sum()) * int(negative.sum())
    if not pairs:
        return None
    below = negative.cumsum() - negative
    return float((positive * (below + negative / 2)).sum() / pairs)


def _position(confidence_N: np.ndarray, survived_N: np.ndarray) -> PositionReliability:
    index_N = _bin_of(confidence_N, ECE_BINS)
    return PositionReliability(
        rounds=len(confidence_N),
        accepted=float(survived_N.mean()),
        confidence=float(confidence_N.mean()),
        ece=ece(confidence_N, survived_N),
        brier=float(((confidence_N - survived_N) ** 2).mean()),
        auroc=auroc(confidence_N, survived_N),
        bins=tuple(
            Bin(
                index=int(index),
                rounds=int((index_N == index).sum()),
                confidence=float(confidence_N[index_N == index].mean()),
                accepted=float(survived_N[index_N == index].mean()),
            )
            for index in np.unique(index_N)
        ),
    )


def _bin_of(confidence_N: np.ndarray, bins: int) -> np.ndarray:
    return np.minimum((confidence_N * bins).astype(np.int64), bins - 1)


def _weighted(values: Sequence[tuple[float, int]]) -> float | None:
    total = sum(weight for _, weight in values)
    return sum(value * weight for value, weight in values) / total if total else None
