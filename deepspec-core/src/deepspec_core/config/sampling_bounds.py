"""Validators of sampling settings: what a temperature and a stop string can be. Imports attrs only."""

from __future__ import annotations

from typing import Any, Final

from attrs import Attribute

from deepspec_core.config.bounds import real

# Divided by less than this, logits leave the range of 32-bit floats.
COLDEST: Final = 1e-6


def temperatures(_options: object, attribute: Attribute[Any], value: float) -> None:
    """A validator: 0, or a temperature that logits can be divided by."""
    real(0.0, 100.0)(None, attribute, value)
    if 0.0 < value < COLDEST:
        raise ValueError(f"'{attribute.name}' must be 0 for greedy decoding, or at least {COLDEST:g}: {value}")


def once_each(_options: object, attribute: Attribute[Any], value: tuple[float, ...]) -> None:
    """A validator: numbers of which no two are the same."""
    if len(set(value)) < len(value):
        raise ValueError(f"'{attribute.name}' must be different numbers: {list(value)}")


def stop_string(_options: object, attribute: Attribute[Any], value: str) -> None:
    """A validator: a text that an answer can have."""
    if not value:
        raise ValueError(f"'{attribute.name}' must be a text that is not empty: {value!r}")
