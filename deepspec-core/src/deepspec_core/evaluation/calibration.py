"""Sequential temperature scaling: a temperature for each position's confidence logit, fitted on recorded rounds.

Positions are fitted from left to right. For each position, every temperature of a grid is tried, and the one is taken
whose product of confidences up to that position has the least expected calibration error. The temperatures of earlier
positions stay fixed. Dividing the logits of a position by a temperature keeps the order of its confidences. This file
knows recorded rounds. It does not know drafts or files.

Legend: N rounds, K positions.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from attrs import evolve, frozen

from deepspec_core.evaluation.reliability import Judged, Reliability, ece, reliability, survival

# From 0.1 to 10 in equal steps of the logarithm. 1 is in the grid, so fitting makes no position worse.
GRID: Final = tuple(10 ** (step / 20) for step in range(-20, 21))


@frozen(kw_only=True)
class Fitted:
    """Temperatures, and how well confidences predict acceptance on the same rounds before and after scaling.

    `after_left_out` judges each half of the prompts with temperatures that were fitted on the other half. It is None
    where there are fewer than two prompts.
    """

    temperatures: tuple[float, ...]
    before: Reliability
    after: Reliability
    after_left_out: Reliability | None

    @property
    def at_the_edge(self) -> tuple[int, ...]:
        """The positions, from 1, whose temperature is an end of the grid. A better temperature may lie beyond it."""
        return tuple(k for k, one in enumerate(self.temperatures, start=1) if one in (GRID[0], GRID[-1]))


def fitted(rounds: Judged, positions: int) -> Fitted:
    """Fit the temperatures of this many positions, and judge the result."""
    temperatures = fit(rounds, positions)
    return Fitted(
        temperatures=temperatures,
        before=reliability(rounds),
        after=reliability(rounds, temperatures[: rounds.logits.shape[1]]),
        after_left_out=left_out(rounds, positions),
    )


def fit(rounds: Judged, positions: int) -> tuple[float, ...]:
    """The temperatures of this many positions. A position at which no round proposed a token gets 1.

    Among temperatures with equal errors, the one nearest to 1 is taken.
    """
    before_N = np.ones(len(rounds.logits))
    found: list[float] = []
    for k in range(positions):
        at_N = rounds.proposed[:, k] if k < rounds.proposed.shape[1] else np.zeros(len(before_N), dtype=bool)
        if not at_N.any():
            found.append(1.0)
            continue
        logits_N, survived_N = rounds.logits[at_N, k], rounds.survived[at_N, k]

        def error(
            temperature: float,
            logits_N: np.ndarray = logits_N,
            survived_N: np.ndarray = survived_N,
            prefix_N: np.ndarray = before_N[at_N],
        ) -> tuple[float, float, float]:
            confidence_N = prefix_N * survival(logits_N[:, None], [temperature])[:, 0]
            return ece(confidence_N, survived_N), abs(math.log(temperature)), temperature

        found.append(min(GRID, key=error))
        before_N = before_N * survival(rounds.logits[:, k : k + 1], [found[-1]])[:, 0]
    return tuple(found)


def left_out(rounds: Judged, positions: int) -> Reliability | None:
    """The figures of each half of the prompts with temperatures that were fitted on the other half.

    All answers to a prompt are in the same half, because they are alike. Returns None if fewer than two prompts have
    rounds.
    """
    known = np.unique(rounds.prompt)
    if len(known) < 2:
        return None
    second_N = np.isin(rounds.prompt, known[1::2])
    logits_NK = rounds.logits.copy()
    for half_N in (second_N, ~second_N):
        fitted_K = fit(rounds.of_rounds(~half_N), positions)
        logits_NK[half_N] /= np.array(fitted_K[: logits_NK.shape[1]])
    return reliability(evolve(rounds, logits=logits_NK))
