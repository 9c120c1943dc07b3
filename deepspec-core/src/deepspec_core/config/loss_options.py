"""[loss]: the terms with their coefficients, schedules and options, and the weighting of rows.

Imports attrs only. structure.py looks up the options of a plugin's term or weighting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import Attribute, field, frozen
from attrs.validators import deep_mapping, in_, instance_of, optional

from deepspec_core.config.bounds import whole
from deepspec_core.config.key_marks import CHANGES_NOTHING, FILLED_IN
from deepspec_core.rows.coefficient_schedule import CoefficientSchedule, coefficient

KERNELS = ("auto", "plain", "eager", "compiled", "triton")


@frozen(kw_only=True)
class WeightingOptions:
    """[loss] weighting: a table whose `type` names the weighting. The weighting's own keys go in the same table.

    type: The rule that weights the rows of a block; its own keys go beside this one.
    """

    type: str = "uniform"
    options: Any = field(default=None, metadata=FILLED_IN)


def _number_or_schedule(options: object, attribute: Attribute[Any], value: object) -> None:
    if not isinstance(value, CoefficientSchedule):
        coefficient(options, attribute, value)


@frozen(kw_only=True)
class TermOptions:
    """An entry of [loss] terms whose term has keys of its own. They go in the same table as the coefficient:
    terms = {NAME = {coefficient = 0.5, temperature = 2.0}}. For a coefficient that changes over training, the keys of
    its schedule may replace `coefficient` in this table.

    coefficient: The factor of the term: a number, or the table of a coefficient that changes over training.
    """

    coefficient: float | CoefficientSchedule = field(validator=_number_or_schedule)
    options: Any = field(metadata=FILLED_IN)


def _coefficient_of_term(options: object, attribute: Attribute[Any], value: object) -> None:
    if not isinstance(value, TermOptions):
        _number_or_schedule(options, attribute, value)


Terms = dict[str, float | CoefficientSchedule | TermOptions]


def _numbers_first(terms: Mapping[str, float | CoefficientSchedule | TermOptions]) -> Terms:
    return dict(sorted(terms.items(), key=lambda entry: isinstance(entry[1], CoefficientSchedule | TermOptions)))


@frozen(kw_only=True)
class LossOptions:
    """[loss]: the training loss, a weighted sum of terms.

    The order of terms in the file does not matter: terms given as a number are summed first, then those given as a
    table.

    terms: The loss terms and their coefficients: a number, or a table if the coefficient changes over training or the
        term has keys of its own. Left out: the algorithm's default terms.
    weighting: How much each row (each token that a block predicts) counts. Left out: the algorithm's default weighting.
    chunk_rows: The number of rows whose logits are in memory at once. Left out: chosen by the size of the vocabulary.
    kernels: The implementation of the passes over logits. "auto" takes the fastest one that this machine can run.
    """

    terms: Terms = field(
        factory=lambda: {"ce": 1.0},
        converter=_numbers_first,
        validator=deep_mapping(key_validator=instance_of(str), value_validator=_coefficient_of_term),
    )
    weighting: WeightingOptions = field(factory=WeightingOptions)
    chunk_rows: int | None = field(default=None, validator=optional(whole(1)), metadata=CHANGES_NOTHING)
    kernels: str = field(default="auto", validator=in_(KERNELS), metadata=CHANGES_NOTHING)
