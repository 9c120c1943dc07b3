"""[features]: where the target's features come from, and how servers are asked for them.

Imports attrs only. served_checks.py checks which keys go together.
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
        raise ValueError(f"'{attribute.name}' must not be empty; leave it out if there is none")


@frozen(kw_only=True)
class FeaturesOptions:
    """[features]: the source of the target's features (the hidden states that the draft is trained on).

    mode: "online": the target runs beside the draft during training. "cached": training reads the cache that the cache
        stage wrote. "server": the target runs in serving engines elsewhere, and training reads the features that they
        write.
    servers: The serving engines' addresses, such as "http://host:8000/v1"; `deepspec serve` starts such an engine. With
        "cached", the cache stage takes its features from them.
    served_as: The target's model name on the servers. Left out: target.model, or its folder.
    exchange: The folder into which the servers write features. The servers and the run must see it under the same path.
    exchange_gb: The most gigabytes (10^9 bytes) that this run's files take in `exchange`, over all processes.
    in_flight: The largest number of requests that one server has at once from this run, shared between its processes.
        Each process may have one, also if there are more processes than requests. The run sends fewer where more would
        not raise the throughput.
    prefetch: The largest number of samples that each process requests ahead of training. Their features are in memory
        once they have been read. Left out: twice as many as the process may have in flight.
    timeout: Seconds that a server may take for one answer, and that the run waits while no server is usable.
    file_timeout: Seconds that a server may take, after its answer, to write its file.
    api_key_env: The environment variable that holds the servers' API key.
    probe: A check before the first stage: the servers' features of one text are compared with a reference. "target":
        the features of the target in this process, which loads it for the check and frees it again. "servers": the
        first server's features. "off": no check.
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
