"""[loss]: the terms with their coefficients, schedules and options, and the weighting of rows.

Imports attrs only. What options a plugin's term or weighting has, structure.py finds out.
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
    """[loss] weighting: a table whose `type` names the weighting. Its own keys stand in the same table.

    type: How much each row of a block counts; the weighting's own keys stand beside this one.
    """

    type: str = "uniform"
    options: Any = field(default=None, metadata=FILLED_IN)


def _number_or_schedule(options: object, attribute: Attribute[Any], value: object) -> None:
    if not isinstance(value, CoefficientSchedule):
        coefficient(options, attribute, value)


@frozen(kw_only=True)
class TermOptions:
    """An entry of [loss] terms whose term has keys of its own. They stand in the same table as the coefficient:
    terms = {NAME = {coefficient = 0.5, temperature = 2.0}}. The keys of a coefficient that changes may stand there too,
    in the place of `coefficient`.

    coefficient: What the term is multiplied by: a number, or a table for one that changes.
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
    """[loss]: what the draft is trained on.

    The order of terms in the file does not matter: terms given as a number are summed first, then those given as a
    table.

    terms: Loss terms and their coefficients: numbers, or tables for coefficients that change and for terms with keys of
        their own. Left out: what the algorithm asks for.
    weighting: How much each row of a block counts. Left out: what the algorithm asks for.
    chunk_rows: The number of rows whose logits exist at once. Left out: it follows from the vocabulary.
    kernels: How the passes over logits run. "auto" takes the fastest that can run here.
    """

    terms: Terms = field(
        factory=lambda: {"ce": 1.0},
        converter=_numbers_first,
        validator=deep_mapping(key_validator=instance_of(str), value_validator=_coefficient_of_term),
    )
    weighting: WeightingOptions = field(factory=WeightingOptions)
    chunk_rows: int | None = field(default=None, validator=optional(whole(1)), metadata=CHANGES_NOTHING)
    kernels: str = field(default="auto", validator=in_(KERNELS), metadata=CHANGES_NOTHING)
