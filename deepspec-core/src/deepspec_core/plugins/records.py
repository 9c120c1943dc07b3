"""What is known of one installed plugin: its package, whether it was loaded, what it offers. Knows no discovery."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from attrs import field, frozen

Status = Literal["ok", "broken", "incompatible", "blocked", "duplicate"]


@frozen(kw_only=True)
class PluginRecord:
    """One entry point, loaded or not.

    `status`: ok; broken (it raised, or a hook or spec is not as it must be); incompatible (it asks for another
    deepspec-core); blocked (by the user); duplicate (loaded, but another plugin claims one of its names, which neither
    can serve then). `reason` is None exactly where status is ok. `offers` maps a kind to the names offered.
    """

    name: str
    package: str
    version: str
    status: Status = "ok"
    reason: str | None = None
    offers: Mapping[str, Sequence[str]] = field(factory=dict)

    @property
    def loaded(self) -> bool:
        """Whether what it offers can be used (but for names claimed twice)."""
        return self.status in ("ok", "duplicate")


def canonical(name: str) -> str:
    """A distribution's name in the one spelling that tells it from others: lower case, dashes."""
    return re.sub(r"[-_.]+", "-", name).lower()
