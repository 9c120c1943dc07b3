"""Validators of numbers that a run file, a plugin's options or a checkpoint's config.json may say.

A number beyond what any machine or model can mean is a slip of the hand or a damaged file. Refused, it costs nothing;
believed, it takes the machine's memory or its threads. Imports attrs only. Knows numbers; not what they are for.
"""

from __future__ import annotations

import math
from typing import Any, Final

from attrs import Attribute
from attrs.validators import and_, ge, gt, le, lt

__all__ = ["MANY", "above", "below", "real", "whole"]

MANY: Final = 2**31 - 1
"""More of anything than a run can have: steps, samples, tokens of one text, sequences of a batch."""


def whole(least: int, most: int = MANY) -> Any:
    """An attrs validator: a whole number from `least` to `most`. Truth values and floats are none."""
    return and_(_is_whole, ge(least), le(most))


def real(least: float, most: float) -> Any:
    """An attrs validator: a finite number from `least` to `most`."""
    return and_(_is_number, ge(least), le(most))


def above(bound: float, most: float) -> Any:
    """An attrs validator: a finite number greater than `bound`, up to `most`."""
    return and_(_is_number, gt(bound), le(most))


def below(least: float, bound: float) -> Any:
    """An attrs validator: a finite number from `least`, less than `bound`."""
    return and_(_is_number, ge(least), lt(bound))


def _is_whole(_options: object, attribute: Attribute[Any], value: object) -> None:
    if type(value) is not int:
        raise TypeError(f"'{attribute.name}' must be a whole number: {value}")


def _is_number(_options: object, attribute: Attribute[Any], value: object) -> None:
    if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]
        raise TypeError(f"'{attribute.name}' must be a finite number: {value}")
