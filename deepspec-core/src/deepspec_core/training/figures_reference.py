"""docs/training-figures.md: every name in metrics.jsonl, with its meaning and unit.

The names are stable: reports, trackers and other people's scripts may rely on them. A test trains with every algorithm
and fails on a name that is not listed here. Knows names; does not know how figures are computed.
"""

from __future__ import annotations

import re
from typing import Final

from attrs import frozen

from deepspec_core.training.metrics_lines import HELD_OUT_LENGTH


@frozen
class Figure:
    """name: The name in metrics.jsonl; `{k}` stands for a slot's number, `{term}` for the name of a loss term."""

    name: str
    unit: str
    meaning: str

    def is_named(self, name: str) -> bool:
        """Whether `name` is a name of this figure."""
        pattern = re.escape(self.name).replace(r"\{k\}", r"\d+").replace(r"\{term\}", ".+")
        return re.fullmatch(pattern, name) is not None


FIGURES: Final = (
    Figure("step", "steps", "The number of optimizer steps done so far."),
    Figure("epoch", "epochs", "The number of passes over the training samples done so far."),
    Figure("lr", "", "The learning rate of the step."),
    Figure("grad_norm", "", "The norm of the step's gradient before it is clipped."),
    Figure(
        "loss",
        "",
        "The training loss: the sum of its terms times their coefficients. The mean over the steps since the last "
        "line.",
    ),
    Figure(
        "loss/{term}", "", "A term of `[loss]`, without its coefficient. The mean over the steps since the last line."
    ),
    Figure(
        "tau_probabilistic",
        "tokens",
        "The accepted length computed from the draft's and the target's distributions on training samples: an "
        "estimate of the accepted length of sampling at temperature 1.",
    ),
    Figure(
        "tau_greedy",
        "tokens",
        "The accepted length on training samples if a token is accepted when the draft's most probable token is the "
        "label.",
    ),
    Figure("accept_rate@{k}", "share", "The mean acceptance rate of slot k, counted from 0."),
    Figure(
        "accuracy@{k}",
        "share",
        "The share of predictions of slot k in which the draft's most probable token is the label.",
    ),
    Figure("confidence_abs_error", "share", "The mean absolute difference of confidences and acceptance rates."),
    Figure("confidence_bias", "share", "The mean of the confidences minus the mean of the acceptance rates."),
    Figure(
        "confidence_cumprod_bias",
        "share",
        "The same difference for whole prefixes: the products of the confidences up to a slot, minus those of the "
        "acceptance rates.",
    ),
    Figure(
        "outside_vocabulary",
        "share",
        "The share of labels that a draft with a reduced vocabulary cannot propose.",
    ),
    Figure(
        "tokens_per_second",
        "tokens/s",
        "Tokens of samples, supervised or not, without padding, over all ranks.",
    ),
    Figure("sequences_per_second", "sequences/s", "Samples, over all ranks."),
    Figure(
        "loader_wait",
        "share",
        "The share of the time since the last line in which the first rank waited for samples to be read and prepared.",
    ),
    Figure(
        "served_bytes",
        "bytes",
        "The size of the features that servers wrote for this run since this process started, over all ranks.",
    ),
    Figure(
        "served_failures",
        "",
        "The number of failed exchanges with servers since this process started, over all ranks. After a failure, the "
        "features of the text are requested again.",
    ),
    Figure("step_seconds", "s", "The time of an optimizer step. The mean over the steps since the last line."),
    Figure(
        "padding_share",
        "share",
        "The share of positions in batches that hold padding, since the last line.",
    ),
    Figure(
        "peak_memory_bytes",
        "bytes",
        "The peak memory since the process began, of the rank with the highest peak: allocated on an accelerator, or "
        "resident in the process on a CPU.",
    ),
    Figure(
        "slowest_rank",
        "rank",
        "With several ranks: the one that computes longest in a step before it waits for the others.",
    ),
    Figure(
        "slowest_rank_seconds",
        "s",
        "The time that the slowest rank computes in a step. The mean over the steps since the last line.",
    ),
    Figure(
        "fastest_rank_seconds",
        "s",
        "The time that the fastest rank computes in a step. The mean over the steps since the last line.",
    ),
    Figure(HELD_OUT_LENGTH, "tokens", "The accepted length of speculative decoding on held-out prompts."),
    Figure("held_out/seconds", "s", "The duration of that evaluation on held-out prompts."),
    Figure(
        "held_out/time_share",
        "share",
        "The share of the time of training so far that all evaluations on held-out prompts have taken.",
    ),
)

_HEAD = """# The figures of training

Training writes a line of `train/metrics.jsonl` every `train.log_every` steps: one JSON object with these names. The
names are stable. Figures that a run does not have are left out: those of ranks need several ranks, and acceptance rates
need the target's distributions beside the draft's.

`accuracy@k`, `accept_rate@k`, `tau_greedy` and `tau_probabilistic` are measured on the logged step only.
[Trackers](stages/train.md#watching) show the same names with `/` in place of `@`: `accuracy/0`.

| name | unit | meaning |
|---|---|---|
"""


def figure_of(name: str) -> Figure | None:
    """The figure with this name in metrics.jsonl; None if it is not documented."""
    return next((figure for figure in FIGURES if figure.is_named(name)), None)


def markdown() -> str:
    """The page."""
    return _HEAD + "".join(f"| `{one.name}` | {one.unit} | {one.meaning} |\n" for one in FIGURES)
