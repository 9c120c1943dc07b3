"""[features]: where the target's features come from, and how servers are asked for them.

Imports attrs only. Which keys go together, served_checks.py knows.
"""

from __future__ import annotations

from typing import Any

from attrs import Attribute, field, frozen
from attrs.validators import deep_iterable, in_, optional

from deepspec_core.config.addresses import address, different
from deepspec_core.config.bounds import above, whole
from deepspec_core.config.key_marks import CHANGES_NOTHING

ONLINE, CACHED, SERVER = "online", "cached", "server"
PROBES = ("target", "servers", "off")
_REQUESTS = 2**20  # more than any server takes


def _said(_options: object, attribute: Attribute[Any], value: str) -> None:
    if not value.strip():
        raise ValueError(f"'{attribute.name}' must not be empty: leave it out, or say it")


@frozen(kw_only=True)
class FeaturesOptions:
    """[features]: where training takes the target's features from.

    mode: "online": the target runs beside the draft while training. "cached": training reads what the cache stage
        wrote. "server": the target runs in serving engines elsewhere, and training reads what they write.
    servers: The engines' addresses, such as "http://host:8000/v1"; `deepspec serve` starts one. With "cached", the
        cache stage takes its features from them.
    served_as: The name by which the servers know the target. Left out: target.model, or its folder.
    exchange: The folder into which the servers write features. They and the run need it under the same path.
    exchange_gb: Gigabytes (10^9 bytes) of this run's files in `exchange` at most, over all processes.
    in_flight: Requests that one server has at once from this run, at most. Fewer are sent where more bring no gain.
    prefetch: Samples that each process asks for ahead of training, at most. They stand in memory once they are read.
        Left out: twice as many as it may ask for at once.
    timeout: Seconds that a server may take for one answer, and that a run waits where no server is left.
    file_timeout: Seconds that a server may take after its answer until its file is written.
    api_key_env: The environment variable that holds the servers' key.
    probe: What the servers' features of one text are compared with before the first stage. "target": the target in
        this process, which is loaded for it and let go again. "servers": the first server's. "off": nothing.
    """

    mode: str = ONLINE
    servers: tuple[str, ...] = field(
        default=(), validator=[deep_iterable(address), different], metadata=CHANGES_NOTHING
    )
    served_as: str | None = field(default=None, validator=optional(_said), metadata=CHANGES_NOTHING)
    exchange: str | None = field(default=None, validator=optional(_said), metadata=CHANGES_NOTHING)
    exchange_gb: float = field(default=32.0, validator=above(0.0, 1e9), metadata=CHANGES_NOTHING)
    in_flight: int = field(default=16, validator=whole(1, _REQUESTS), metadata=CHANGES_NOTHING)
    prefetch: int | None = field(default=None, validator=optional(whole(1, _REQUESTS)), metadata=CHANGES_NOTHING)
    timeout: float = field(default=600.0, validator=above(0.0, 1e6), metadata=CHANGES_NOTHING)
    file_timeout: float = field(default=60.0, validator=above(0.0, 1e6), metadata=CHANGES_NOTHING)
    api_key_env: str | None = field(default=None, metadata=CHANGES_NOTHING)
    probe: str = field(default="servers", validator=in_(PROBES), metadata=CHANGES_NOTHING)
