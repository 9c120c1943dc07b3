"""docs/training-figures.md: every name that stands in metrics.jsonl, with its meaning and unit.

The names are stable: what reads them (reports, trackers, other people's scripts) may rely on them. A test trains with
every algorithm and fails on a name that is not here. Knows names; not how figures are made.
"""

from __future__ import annotations

import re
from typing import Final

from attrs import frozen

from deepspec_core.training.metrics_lines import HELD_OUT_LENGTH


@frozen
class Figure:
    """name: As in metrics.jsonl; `{k}` stands for a slot's number, `{term}` for the name of a loss term."""

    name: str
    unit: str
    meaning: str

    def is_named(self, name: str) -> bool:
        """Whether a name is this figure's."""
        pattern = re.escape(self.name).replace(r"\{k\}", r"\d+").replace(r"\{term\}", ".+")
        return re.fullmatch(pattern, name) is not None


FIGURES: Final = (
    Figure("step", "steps", "The optimizer steps that are done."),
    Figure("epoch", "epochs", "Passes over the training samples that are done."),
    Figure("lr", "", "The learning rate of the step."),
    Figure("grad_norm", "", "The norm of the step's gradient before it is clipped."),
    Figure("loss", "", "The sum of its terms times their coefficients. The mean over the steps since the last line."),
    Figure("loss/{term}", "", "A term of `[loss]`, without its coefficient; a mean like that of `loss`."),
    Figure(
        "tau_probabilistic",
        "tokens",
        "The accepted length that follows from the draft's and the target's distributions on training samples: an "
        "estimate of what sampling at temperature 1 accepts.",
    ),
    Figure(
        "tau_greedy",
        "tokens",
        "The same, where a token counts as accepted if it is the label and the draft's likeliest token.",
    ),
    Figure("accept_rate@{k}", "share", "The mean acceptance rate of slot k, counted from 0."),
    Figure("accuracy@{k}", "share", "The share of labels of slot k that are the draft's likeliest token."),
    Figure("confidence_abs_error", "share", "How far confidences are from acceptance rates, on average."),
    Figure("confidence_bias", "share", "How much larger confidences are than acceptance rates, on average."),
    Figure("confidence_cumprod_bias", "share", "The same of the confidence that a whole prefix is accepted."),
    Figure("outside_vocabulary", "share", "Labels that a draft with a reduced vocabulary cannot say."),
    Figure("tokens_per_second", "tokens/s", "Tokens of samples, supervised or not, over all ranks, without padding."),
    Figure("sequences_per_second", "sequences/s", "Samples, over all ranks."),
    Figure(
        "loader_wait",
        "share",
        "Time since the last line in which the first rank waited for samples to be read and prepared.",
    ),
    Figure(
        "served_bytes",
        "bytes",
        "Features that servers wrote for this run since this process started, over all ranks.",
    ),
    Figure(
        "served_failures",
        "",
        "Exchanges with servers that failed since this process started, over all ranks. The text was asked for again.",
    ),
    Figure("step_seconds", "s", "Time of an optimizer step. The mean over the steps since the last line."),
    Figure("padding_share", "share", "Positions of batches that hold no token of a sample, since the last line."),
    Figure(
        "peak_memory_bytes",
        "bytes",
        "The most memory since the process began, of the rank that has the most: allocated on an accelerator, or "
        "resident in the process on a CPU.",
    ),
    Figure(
        "slowest_rank",
        "rank",
        "Of several ranks the one with the most time of its own in a step, before it waits for the others.",
    ),
    Figure("slowest_rank_seconds", "s", "That time, the mean over the steps since the last line."),
    Figure("fastest_rank_seconds", "s", "The same of the fastest rank."),
    Figure(HELD_OUT_LENGTH, "tokens", "The accepted length of real speculative decoding on held-out prompts."),
    Figure("held_out/seconds", "s", "What that evaluation took."),
    Figure("held_out/time_share", "share", "What all of them have taken of the time of training so far."),
)

_HEAD = """# The figures of training

Training writes a line of `train/metrics.jsonl` every `train.log_every` steps: one JSON object with these names. They
are stable. A figure that a run does not have is left out: ranks are there where there are several, and acceptance rates
where the target's distributions are compared with the draft's.

`accuracy@k`, `accept_rate@k`, `tau_greedy` and `tau_probabilistic` are measured on the logged step only. In
[trackers](stages/train.md#watching) names are the same, but for `@`, which is `/` there: `accuracy/0`.

| name | unit | meaning |
|---|---|---|
"""


def figure_of(name: str) -> Figure | None:
    """The figure of a name in metrics.jsonl; None where it is not documented."""
    return next((figure for figure in FIGURES if figure.is_named(name)), None)


def markdown() -> str:
    """The page."""
    return _HEAD + "".join(f"| `{one.name}` | {one.unit} | {one.meaning} |\n" for one in FIGURES)
