"""The names in [draft] init that mean the target's own layers, in the place of a checkpoint.

Imports attrs only. pipeline/target_layers.py says what they do.
"""

from __future__ import annotations

from typing import Any, Final

from attrs import Attribute

# What stands before them. No directory or Hub id has a colon.
TARGET: Final = "target:"
LAST, TAPS = f"{TARGET}last", f"{TARGET}taps"
TARGET_STARTS: Final = (LAST, TAPS)


def known_start(_options: object, attribute: Attribute[Any], value: str | None) -> None:
    """A validator: of what begins with "target:", these two only."""
    if value is not None and value.startswith(TARGET) and value not in TARGET_STARTS:
        raise ValueError(f"'{attribute.name}' must be one of {', '.join(TARGET_STARTS)}, or a checkpoint: {value}")
