"""Whether a run has the held-out prompts that its stages decode.

Imports attrs only. Which conversations are held out, data/split.py knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from deepspec_core.config.train_options import HeldOutOptions, TrainOptions
from deepspec_core.errors import ConfigError

if TYPE_CHECKING:
    from deepspec_core.config.schema import DataOptions

_BUILTIN = "builtin:"


def nothing_held_out(data: DataOptions) -> bool:
    """Whether it is known that the sources have no held-out prompts."""
    # Prompts that a plugin ships have a held-out part of their own, which counts where there is no other source.
    alone = len(data.sources) == 1 and data.sources[0].path.startswith(_BUILTIN)
    return data.held_out == 0 and bool(data.sources) and not alone


def evaluation_mistakes(train: TrainOptions, data: DataOptions | None) -> Iterator[ConfigError]:
    """What is wrong with [train]'s keys about evaluations during training."""
    if train.evaluate_every is None:
        if train.evaluation != HeldOutOptions():
            yield ConfigError(
                "train.evaluation has no effect, because there are no evaluations during training",
                where="train.evaluation",
                expected="train.evaluate_every, the number of steps between evaluations",
                fix="set train.evaluate_every, or remove the table",
            )
        return
    if data is not None and nothing_held_out(data):
        yield ConfigError(
            "no prompts are held out from training",
            where="data.held_out",
            found=f"0, with train.evaluate_every = {train.evaluate_every}",
            expected="a share above 0",
            fix="set data.held_out = 0.05, or remove train.evaluate_every",
        )
