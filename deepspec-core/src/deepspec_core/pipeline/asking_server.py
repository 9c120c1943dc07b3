"""The server that a command measures: its address, and the run's target as the server must serve it.

Knows runs and the options of commands. servers/ sends the requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from urllib.parse import urlsplit

from deepspec_core.contracts.proposer import Sampling
from deepspec_core.decoding.engine import Request
from deepspec_core.errors import ConfigError
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.serving import key_in, wanted_of_target
from deepspec_core.servers.wanted import Names, Wanted

_OPTIONS: Final = Names(servers="--server", served_as="--served-as", key="--api-key-env", length="--max-new-tokens")


def address_of(given: str) -> str:
    """The address of the protocol: /v1 stands behind the server's root, which may be given without it."""
    parts = urlsplit(given)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            "This is not the address of a server",
            where="--server",
            found=given,
            expected="an address like http://host:8000",
        )
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            "The server's address contains a user or password, and results would store it",
            where="--server",
            expected="an address without a name and a password",
            fix="Name the environment variable that holds the key in --api-key-env.",
        )
    return given.rstrip("/").removesuffix("/v1") + "/v1"


def wanted_of(
    run: Run,
    requests: Sequence[Request],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    whole_context: bool = False,
    served_as: str | None,
    api_key_env: str | None,
    timeout: float = 1800.0,
) -> Wanted:
    """The run's target with room for these requests, or with all its positions. `served_as` is the server's name of
    it, if it is another one. Raises ConfigError if the environment has no such key."""
    positions = run.target.architecture.max_positions
    longest = max(len(request.prompt_ids) for request in requests)
    return wanted_of_target(
        run,
        served_as=served_as,
        sampling=sampling,
        max_tokens=max_new_tokens,
        max_length=positions if whole_context else min(positions, longest + max_new_tokens),
        key=key_in(api_key_env, where="--api-key-env"),
        timeout=timeout,
        called=_OPTIONS,
    )
