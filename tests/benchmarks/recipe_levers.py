"""The recipes that recipes.py compares: a published run file, and what may be changed of it, one lever at a time.

A row's name is a drafter and levers, joined by "+", such as dspark+ce+anchors64. Any combination can be asked for.
Later levers overrule earlier ones. Each lever has its prediction, written before it was run. Knows keys of run files.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from attrs import frozen

QUICKSTART: Final = Path(__file__).parents[2] / "examples" / "quickstart"
DRAFTERS: Final = ("dspark", "dflash", "eagle3")
BLOCKS, ALL = ("dspark", "dflash"), DRAFTERS


@frozen
class Lever:
    """`settings` of a run of so many steps, as after --set; for whom it is; and what it was expected to do at T = 0."""

    settings: Callable[[int], tuple[str, ...]]
    drafters: tuple[str, ...]
    predicted: str


def _set(*settings: str, of: tuple[str, ...] = ALL, predicted: str) -> Lever:
    return Lever(lambda _: settings, of, predicted)


def _terms(terms: str) -> tuple[str, ...]:
    return (f"loss.terms={{{terms}}}",)


def _moving(first: str, then: str) -> Callable[[int], tuple[str, ...]]:
    """From one term to another over the second third of training, with confidence beside both."""

    def settings(steps: int) -> tuple[str, ...]:
        third = max(1, steps // 3)
        over = f"steps = {third}, after = {third}"
        moving = (f"{first} = {{start = 1.0, end = 0.1, {over}}}", f"{then} = {{start = 0.0, end = 0.9, {over}}}")
        return ('draft.confidence_gradient="stop"', *_terms(", ".join((*moving, "confidence = 1.0"))))

    return settings


_STOP: Final = 'draft.confidence_gradient="stop"'
_DSPARK: Final = ("dspark",)
_EAGLE3: Final = ("eagle3",)

LEVERS: Final[dict[str, Lever]] = {
    # Losses.
    "stop": _set(_STOP, of=_DSPARK, predicted="+0.2, as in three seeds of drafters.py"),
    "conf0.1": _set("loss.terms.confidence=0.1", of=_DSPARK, predicted="+0.1: most of what stopping it gives"),
    "ce": _set(_STOP, *_terms("ce = 1.0, confidence = 1.0"), of=_DSPARK, predicted="+0.7, as in three seeds"),
    "ce-tv": Lever(_moving("ce", "tv"), _DSPARK, "+0.7 and more than ce at T = 1, where total variation is the aim"),
    "ce-lk": Lever(_moving("ce", "lk"), _DSPARK, "as ce-tv"),
    "lk": _set(_STOP, *_terms("lk = 1.0, confidence = 1.0"), of=_DSPARK, predicted="+0.6: no vanishing gradient"),
    "soft-ce": _set(_STOP, *_terms("soft_ce = 1.0, confidence = 1.0"), of=_DSPARK, predicted="+0.8: less noise"),
    "soft": _set(*_terms("soft_ce = 1.0"), of=("dflash",), predicted="+0.1: less noise than ce"),
    "d-pace": _set('loss.weighting={type = "d-pace"}', of=BLOCKS, predicted="+0.1"),
    "uniform": _set('loss.weighting={type = "uniform"}', of=BLOCKS, predicted="-0.1: late slots count too early"),
    # What a step sees.
    "anchors8": _set("draft.num_anchors=8", of=BLOCKS, predicted="-0.1: more steps, each with fewer rows"),
    "anchors32": _set("draft.num_anchors=32", of=BLOCKS, predicted="0.1 above, fewer steps notwithstanding"),
    "anchors64": _set("draft.num_anchors=64", of=BLOCKS, predicted="0 to +0.2 at equal compute: 2.4 times fewer steps"),
    "batch8": _set("train.global_batch_size=8", predicted="+0.2: twice the steps"),
    "batch32": _set("train.global_batch_size=32", predicted="-0.3: half the steps"),
    # What the draft is.
    "block7": _set("draft.block_size=7", of=BLOCKS, predicted="0: two more proposals, which rarely stand"),
    "from-last": _set("draft.init=target:last", of=BLOCKS, predicted="+0.1, although they never saw a block"),
    "from-taps": _set("draft.init=target:taps", of=BLOCKS, predicted="+0.1, less than from-last"),
    "layers2": _set("draft.num_layers=2", of=BLOCKS, predicted="-0.1, and more per draft time"),
    "rank64": _set("draft.markov.rank=64", of=_DSPARK, predicted="+0.05"),
    "gated": _set('draft.markov.head="gated"', of=_DSPARK, predicted="+0.05"),
    "rnn": _set('draft.markov.head="rnn"', of=_DSPARK, predicted="+0.1"),
    "taps-late": _set("target.layers=[6, 7, 8, 9, 10]", predicted="-0.1: early layers know the exact tokens"),
    "taps-early": _set("target.layers=[-1, 2, 5, 8, 10]", predicted="0"),
    # The optimizer.
    "lr2": _set("train.lr=8e-3", predicted="-0.2"),
    "lr-half": _set("train.lr=2e-3", predicted="-0.1 in so few steps"),
    "muon": _set("train.optimizer=muon", predicted="+0.3, although its own products take an eighth of the steps"),
    "warmup10": _set("train.warmup=0.1", predicted="0"),
    # Data.
    "greedy": _set("regenerate.temperature=0.0", predicted="+0.2 at T = 0 and less at T = 1"),
    "fresh": _set(
        'data.sources=[{path = "builtin:tiny-dialogues", limit = 10000}]',
        predicted="+0.1: each answer is seen 1.5 times in place of 6, at four times the answering",
    ),
    "answers4": _set(
        "regenerate.answers=4", predicted="0 to +0.1: less than fresh, at four times the answering"
    ),
    "half": _set(
        'data.sources=[{path = "builtin:tiny-dialogues", limit = 1250}]', predicted="-0.1: each answer seen 12 times"
    ),
    # Eagle3's own.
    "labels": _set('draft.count="labels"', of=_EAGLE3, predicted="+0.2, as in two seeds"),
    "steps3": _set("draft.ttt_length=3", of=_EAGLE3, predicted="-0.5: three proposals a round at most"),
    "steps7": _set("draft.ttt_length=7", of=_EAGLE3, predicted="+0.2: two more proposals, of which many stand"),
    "decay1": _set("draft.step_decay=1.0", of=_EAGLE3, predicted="0"),
    "decay0.6": _set("draft.step_decay=0.6", of=_EAGLE3, predicted="-0.05"),
    "padded": _set('draft.normaliser="padded_batch"', of=_EAGLE3, predicted="0"),
    "hard-ce": _set(*_terms("ce = 1.0"), of=_EAGLE3, predicted="-0.2: the label is one draw of the distribution"),
    "draws16": _set("draft.num_anchors=16", of=_EAGLE3, predicted="+0.2: 0.6 of the cost a step, so more steps"),
}  # fmt: skip
# Best ones together, by what is known of them alone.
TOGETHER: Final = (
    "dspark+ce+anchors32",
    "dspark+ce+anchors64",
    "dspark+ce+batch8",
    "dspark+ce+muon",
    "dspark+ce+muon+anchors32",
    "dspark+ce+muon+anchors64",
    "dspark+soft-ce+muon",
    "dflash+soft+muon",
    "eagle3+labels+draws16",
    "eagle3+labels+muon",
    "eagle3+labels+muon+draws16",
)


def rows() -> list[str]:
    """The whole table: each drafter as published, with each of its levers alone, and what is tried together."""
    alone = [f"{drafter}+{name}" for drafter in DRAFTERS for name, one in LEVERS.items() if drafter in one.drafters]
    return [*DRAFTERS, *alone, *TOGETHER]


def parts(row: str) -> tuple[str, list[str]]:
    """The drafter and the levers of a row's name. Exits for a name that is none."""
    drafter, *names = row.split("+")
    if drafter not in DRAFTERS:
        sys.exit(f"{row}: {drafter!r} is no drafter; there are {', '.join(DRAFTERS)}")
    for name in names:
        if name not in LEVERS or drafter not in LEVERS[name].drafters:
            known = ", ".join(one for one, lever in LEVERS.items() if drafter in lever.drafters)
            sys.exit(f"{row}: {name!r} is no lever of {drafter}; there are {known}")
    return drafter, names


def run_file(row: str, folder: Path = QUICKSTART) -> Path:
    """The published recipe that a row starts from."""
    return folder / f"{parts(row)[0]}.toml"


def settings(row: str, steps: int) -> tuple[str, ...]:
    """What a row changes of it, in a run of so many steps."""
    return tuple(one for name in parts(row)[1] for one in LEVERS[name].settings(steps))


def predicted(row: str) -> str:
    """What was expected of a row with one lever."""
    _, names = parts(row)
    return LEVERS[names[0]].predicted if len(names) == 1 else ""
