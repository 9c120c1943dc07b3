"""What is known of an installed plugin: its package, whether it was loaded, what it offers. Does not find plugins."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from attrs import field, frozen

CORE = "deepspec-core"

Status = Literal["ok", "broken", "incompatible", "blocked", "duplicate"]


@frozen(kw_only=True)
class PluginRecord:
    """One entry point, loaded or not.

    status: "ok"; "broken" (it raised an error, or one of its hooks or specs is wrong); "incompatible" (it requires
        another version of deepspec-core); "blocked" (by the user); "duplicate" (it is loaded, but another plugin offers
        one of its names, so that neither can be used under this name).
    reason: None exactly if the status is "ok".
    offers: The names offered, by kind.
    summaries: One line on each offer, by kind, in the order of `offers`.
    slow: What its plugin.py imports that takes long, so that every command waits for it. Known only where nothing else
        in this process had imported it before.
    """

    name: str
    package: str
    version: str
    status: Status = "ok"
    reason: str | None = None
    offers: Mapping[str, Sequence[str]] = field(factory=dict)
    summaries: Mapping[str, Sequence[str]] = field(factory=dict)
    slow: tuple[str, ...] = ()

    @property
    def loaded(self) -> bool:
        """Whether its components can be used, apart from names that two plugins offer."""
        return self.status in ("ok", "duplicate")


def canonical(name: str) -> str:
    """A distribution's name in its normalised spelling: lower case, with dashes."""
    return re.sub(r"[-_.]+", "-", name).lower()
